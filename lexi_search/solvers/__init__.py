"""Stage 2, the search: losses and budgets in, allocations out. Profiles and models are not known here.

Read `problem` (losses, budgets, costs and constraints, checked once), then the exact solutions, `pareto` (the Pareto
front under costs) and `exact` (dynamic programming), then the paper's evolutionary search, `operators` (on one
population) and `evolution` (all budgets at once), `uncertainty` (the effect of measurement errors on a result), and
`robust` (allocations that are even where errors leave nothing surely better).
"""
