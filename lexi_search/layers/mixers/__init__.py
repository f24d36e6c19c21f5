"""Token mixers in JAX: what lets a position see those before it, in whole sequences.

Read `attention`, then `compressed` (to windows summed up), `scans` (linear recurrences in chunks) and `recurrent` (the
layers around them); and `streams`, what mixes several residual streams of one position.
"""
