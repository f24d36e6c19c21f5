"""All experts of a layer in one launch on a Hopper GPU.

Read `blocks` (tokens in blocks of one expert), `hopper` (the Pallas kernel) and `grouped` (a layer's outputs by it).
"""
