"""The mathematics of a decoder layer in JAX; no checkpoint is known here.

Read `spec` (static descriptions) and `weights` (tuples of arrays), then the MoE layer: `routing`, `ffn` (one expert),
`experts` (all tokens through theirs) and `moe` (every k from one pass); then what surrounds it, `attention` and
`decoder`; last `kernels`, all experts in one launch on a Hopper GPU.
"""
