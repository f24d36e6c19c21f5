"""An allocation applied: in vLLM as a plugin, in transformers models in place.

Read `gates` (the gate exponent), with `triton_gates` and `transformers_gates` for it, and `transformers_patch`; then
vLLM: `vllm_names` (an engine's internals by version), `vllm_gates`, `vllm_build` (hooks where layers are built) and
`vllm_plugin` (the entry point).
"""
