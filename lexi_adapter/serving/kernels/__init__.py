"""What a layer with fewer experts computes besides, on torch tensors and in Triton.

Read `gates` (the gate exponent), `correction` (the low-rank map that makes up for dropped experts), and `triton_gates`
(the gate exponent in one kernel).
"""
