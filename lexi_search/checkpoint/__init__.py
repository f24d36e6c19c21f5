"""A folder of safetensors as logical tensors, and back.

Read `folder` (model folders: found, fetched, built) and `config` (checked access to config.json); then quantised
weights: `dequantise` (values from stored parts, in JAX), `quantisation_methods` (the settings of each tool),
`quantisation_config` (those of a checkpoint) and `quantisation_formats` (the names and shapes of each format's parts);
then `tensors` (logical tensors, quantised or not), `reader` (an open checkpoint, which has all of these) and `writer`.
"""
