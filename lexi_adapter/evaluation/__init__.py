"""Quality of the variants of a model on tasks.

Read `transformers_backend` and `vllm_backend` (a variant, loaded), `evaluate` (every task on every variant), `results`
(the files of `eval` and `bench`, read and checked) and `tradeoff` (quality beside speed).
"""
