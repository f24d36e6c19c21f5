"""The files that both packages share: profiles, allocations, cost tables, corrections.

Importing them needs the standard library only; corrections are read with NumPy.

Read `files` (atomic writing, canonical JSON) and `codec` (dataclasses as checked JSON); then the contents, `identity`,
`compensation`, `profile` (with the merging of parts), `allocation` and `cost_table`; then `serialisation` (reading and
writing them) and `records` (every other file of the tools, as a table).
"""
