"""Model families as data, and the description of one checkpoint.

Read `families` (what is said of a family), `moe_families` (MoE layers of each), `finder` and `moe_tensors` (the
tensors of a layer) and `model` (the description of one checkpoint); then the rest of the decoder, `decoder_families`,
`mixers` and `decoder_stack`; last `loading`, which puts a layer's weights on the device.
"""
