"""The command `lexi-search`; only this wing prints.

Read `console` and `options` (shared by the commands), `tables` and `plots` (their output), `progress` (a profile under
way), `commands`, one module per command, `main`, and `entry`, the program itself.
"""
