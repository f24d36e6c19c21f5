"""The command `lexi-adapter`; this wing alone prints.

Read `console` (refusals and printing), `progress` (of long commands), `options` (of several commands), `tables` and
`figures` (of results), `placement` (where a figure's labels go), `commands`, one module a command, `main`, and `entry`,
the program itself.
"""
