"""Layer weights, from the checkpoint's files to a device's memory.

Read `pieces` and `reader`, then `streaming`, once through the files, and `residence`, many times over the same layers.
"""
