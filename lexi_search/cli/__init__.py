"""The command `lexi-search`; only this wing prints.

Read `console` and `options` (shared by the commands), `tables` and `plots` (their output), `progress` (what a long run
shows), `report` (the page that `auto` writes), `commands`, one module per command, `main`, and `entry`, the program
itself.
"""
