"""What a layer with fewer experts computes besides, on torch tensors and in Triton.

Read `gates` (the gate exponent), `correction` (the low-rank map that makes up for dropped experts), `triton_gates` (the
gate exponent in one kernel) and `triton_correction` (both, where an engine routes and sums anyway); `triton_launch`
launches them.
"""
