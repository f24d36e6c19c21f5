"""The forward pass of a model and of many variants of it at once, layer by layer.

A variant gives MoE layers a top-k of their own. All variants go through a layer while its weights are on the device.
Those that agree with the model up to a layer share its hidden states up to there, and where they branch off, their
outputs are mixed from one pass over the experts. Read `variants` and `layer`, then `passes`, then `losses`,
`sampling` (text that the model writes) and `text` (one that a user gives).
"""
