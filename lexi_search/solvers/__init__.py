"""Stage 2, the search: losses and budgets in, allocations out; no profile and no model is known here.

Read `problem` (losses, budgets, costs and constraints, checked once), then the exact solutions, `pareto` (the front
under costs) and `exact` (dynamic programming over sums), then the paper's evolutionary search, `operators` (on one
population) and `evolution` (all budgets at once), and `uncertainty` (how sure a result is).
"""
