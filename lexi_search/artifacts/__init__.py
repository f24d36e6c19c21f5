"""The files that both packages share: profiles, allocations and cost tables. Needs the standard library only.

Read `files` (atomic writing, canonical JSON) and `codec` (dataclasses as checked JSON); then the contents, `identity`,
`profile`, `allocation` and `cost_table`; then `serialisation` (reading and writing them), `merging` (one profile
from parts) and `records` (every other file of the tools, as a table).
"""
