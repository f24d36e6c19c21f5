"""The command `lexi-adapter`; this wing alone prints.

Read `console` and `options` (what commands share), `tables` and `figures` (what they show), `commands`, one module a
command, and `main`.
"""
