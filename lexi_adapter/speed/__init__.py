"""What an allocation gains: `throughput`, `latency` (the cost table) and `expert_load`."""
