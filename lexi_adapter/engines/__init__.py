"""vLLM engines, each in a process of its own, to be measured.

Read `workload` (what is run), `locks` (runs that share a card take turns), `worker` and `kernels` (code inside a
worker), `process` (start, call and stop engines), `options` (of one variant's engine) and `measuring` (functions that
are called in an engine).
"""
