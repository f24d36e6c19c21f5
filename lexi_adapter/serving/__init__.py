"""An allocation applied: to vLLM by a plugin, to a loaded transformers model in place.

Read `kernels` (the arithmetic, on torch tensors and in Triton). Then transformers:
`transformers_gates` (routers with a gate exponent) and `transformers_patch` (`apply`). Then vLLM: `vllm_names` (its
internals, by version), `vllm_gates` (routers with a gate exponent), `vllm_correction` (layers that make up for dropped
experts), `vllm_build` (hooks where layers are built), `vllm_status` (the k that a running server states) and
`vllm_plugin` (the entry point).
"""
