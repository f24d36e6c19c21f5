"""What is asked of a model.

Read `scores` (outcomes and standard errors) and `texts` (what is read and encoded); then the tasks, `perplexity`,
`passkey` and `qasper`, `harness` (lm-eval) and `hooks` (a user's own); last `registry`, which knows them all.
"""
