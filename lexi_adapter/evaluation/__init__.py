"""Quality of variants on tasks.

Read `transformers_backend` and `vllm_backend` (a variant, loaded), `evaluate` (every task on every variant), `results`
(what was written, read back) and `tradeoff` (quality beside speed).
"""
