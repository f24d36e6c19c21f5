"""The files that both packages share, with the standard library alone.

Read `files` (atomic writing, canonical JSON) and `codec` (dataclasses as checked JSON) for the means; `identity`,
`profile`, `allocation` and `cost_table` for what is written; `serialisation` for its bytes; `merging` for profiles put
together from parts.
"""
