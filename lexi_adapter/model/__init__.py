"""A model folder, read without torch, and the variants of one model that are compared.

Read `tensors` (safetensors headers), `folder` (config.json and shards, and whether an allocation fits them), `identity`
(the model of any checkpoint), `compensation` (the file of corrections that an allocation names), `shapes` (a model of a
known family from config.json alone) and `variants` (allocations, uniform k and pruned models side by side).
"""
