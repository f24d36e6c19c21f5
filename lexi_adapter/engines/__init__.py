"""vLLM engines, each in a process of its own, to be measured.

Read `workload` (batches of random tokens), `locks` (runs that share a card take turns), `kernels` and `worker` (code
that runs inside a worker), `process` (start, call and stop engines), `options` (the arguments of one variant's engine)
and `measuring` (functions that are called in an engine).
"""
