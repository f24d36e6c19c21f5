"""All experts of a layer in one launch on a Hopper GPU.

Read `blocks` (experts and tokens in blocks), `hopper` (the Pallas kernels) and `grouped` (a layer's distances by them).
"""
