"""Stage 1, the profile: how much is lost with a layer at each k.

Read `paper` (its input, one layer at a time); then the whole model: `forward` (tokens through the layers, and text that
the model writes), `compensation` (what the router says of dropped experts' outputs) and `divergence` (KL
divergence with one layer changed); then `profile` (all layers), `distributed` (several processes), `resume` (finished
layers kept), `observer` (what is told of a run) and `session`, which puts them together.
"""
