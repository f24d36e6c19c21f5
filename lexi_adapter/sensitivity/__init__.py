"""A profile by brute force: every layer at every k, on text, in transformers.

Read `windows` (the text), `divergence` (KL divergence and cross-entropy), `replay` (layers run again from kept hidden
states), `ablation` (one layer changed), `journal` (finished layers kept) and `profile` (the whole run).
"""
