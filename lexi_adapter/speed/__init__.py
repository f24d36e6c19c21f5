"""The speed of a model under allocations, measured in vLLM.

Read `throughput` (variants side by side), `latency` (time of an engine step at each k: the cost table of a search) and
`expert_load` (tokens per expert).
"""
