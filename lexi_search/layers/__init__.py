"""The mathematics of a decoder layer in JAX. Checkpoints are not known here.

Read `spec` (static descriptions) and `weights` (tuples of arrays), then the MoE layer: `routing`, `ffn` (one expert),
`experts` (each token through its experts) and `moe` (every k from one pass); then the rest of a decoder layer,
`mixers` (attention and its like) and `decoder`; last `kernels`, all experts in one launch on a Hopper GPU.
"""
