"""Pruned checkpoints, the baseline to compare allocations with.

Read `importance` (scores of experts and channels), `slicing` (tensors cut as they are stored), `sizes` (sizes in the
config) and `prune` (a whole folder).
"""
