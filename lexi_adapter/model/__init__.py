"""What a model folder holds, read without torch.

Read `folder` (config.json and safetensors headers), `identity` (does an allocation belong to it), `shapes` (its MoE
layers from config.json alone) and `variants` (what is compared: allocations, uniform k, pruned models).
"""
