"""Token mixers in JAX: what lets a position see those before it, in whole sequences.

Read `attention`, then `scans` (linear recurrences in chunks), then `recurrent` (the layers around them).
"""
