"""The command `lexi-adapter`; this wing alone prints.

Read `console` (refusals and printing) and `options` (options of several commands), `tables` and `figures` (of results),
`commands`, one module a command, `main`, and `entry`, the program itself.
"""
