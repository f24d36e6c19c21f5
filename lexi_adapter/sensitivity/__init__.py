"""A profile by brute force: every layer at every k, on text, in transformers.

Read `windows` (the text), `divergence` (KL divergence and increase of the cross-entropy), `replay` (layers run again
from kept hidden states), `ablation` (one layer at fewer experts), `journal` (the finished parts of a run) and `profile`
(the whole run and its file).
"""
