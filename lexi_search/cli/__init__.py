"""The command `lexi-search`; this wing alone prints.

Read `console` and `options` (what commands share), `tables` and `plots` (what they show), `commands`, one module a
command, and `main`.
"""
