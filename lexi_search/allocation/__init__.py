"""From a profile to what people serve.

Read `costs` (milliseconds of each k), `allocate` (budgets in, allocations out), `tradeoff` (every trade of cost against
loss), `comparison` (one profile judged by another) and `export` (formats for vLLM and transformers).
"""
