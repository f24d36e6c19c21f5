"""Model families as data, and one checkpoint described.

Read `moe_families` (what differs between MoE layers), `finder` and `moe_tensors` (which tensors make up a layer) and
`model` (one checkpoint described); then the rest of the decoder, `rope`, `decoder_families` and `decoder_stack`; last
`loading`, which brings a layer's weights to the device.
"""
