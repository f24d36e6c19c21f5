"""A folder of safetensors as logical tensors, and back.

Read `folder` (found, fetched, built), `reader` (stored arrays by name), `config` (config.json, checked) and `writer`;
then quantised weights: `dequantise` (values from stored parts, in JAX), `quantisation_config` (what a config declares),
`quantisation_formats` (what each format's parts are called) and `tensors` (logical tensors over all of these).
"""
