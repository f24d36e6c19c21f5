"""Token mixers of one checkpoint's layers, described from their tensors and the config.

Read `rope` and `source`, then `streams` (several residual streams) and `ngrams`, then `attention`, `compressed` and
`recurrent`.
"""
