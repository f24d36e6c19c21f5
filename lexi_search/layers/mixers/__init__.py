"""Token mixers in JAX: what lets a position see those before it, in whole sequences.

Read `attention`, then `compressed` (to windows summed up), `scans` (linear recurrences in chunks) and `recurrent` (the
layers around them). Of one position `streams` mixes several residual streams, and `ngrams` adds to them what its last
tokens are.
"""
