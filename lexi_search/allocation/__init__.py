"""From a profile to an allocation that can be served.

Read `costs` (milliseconds of each k), `speed_estimate` (the same where nobody has measured them), `allocate` (budgets
in, allocations out), `tradeoff` (the Pareto front of cost and loss), `targets` (a budget, a speed or a loss in, one
allocation out), `comparison` (one profile judged by another), `baselines` (an allocation beside what it has to beat),
`export` (formats for vLLM and transformers) and `auto` (all of it in one run, from a checkpoint to a served folder).
"""
