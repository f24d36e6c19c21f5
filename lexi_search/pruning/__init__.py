"""Smaller checkpoints, the baseline to compare with.

Read `importance` (which experts and channels matter), `slicing` (tensors cut as they are stored), `sizes` (what a
config says of sizes) and `prune` (a whole folder).
"""
