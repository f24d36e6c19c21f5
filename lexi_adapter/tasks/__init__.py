"""Tasks that measure the quality of a model.

Read `scores` (outcomes and standard errors) and `texts` (files and tokenizers); then the tasks, `perplexity`,
`passkey` and `qasper`, `harness` (lm-eval) and `hooks` (tasks that users write); last `registry`, which makes them
by name.
"""
