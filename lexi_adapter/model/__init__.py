"""A model folder, read without torch, and the variants of one model that are compared.

Read `folder` (config.json and safetensors headers, and whether an allocation fits them), `identity` (the model of any
checkpoint), `shapes` (a model of a known family from config.json alone) and `variants` (allocations, uniform k and
pruned models side by side).
"""
