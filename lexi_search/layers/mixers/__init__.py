"""Token mixers in JAX: what lets a position see those before it, in whole sequences.

Read `attention`, then `streams` (several residual streams), then `scans` (linear recurrences in chunks) and `recurrent`
(the layers around them).
"""
