"""Functions for a process in which Triton interprets its kernels; it imports them by name."""

import torch


def narrow(weights, ids, top_k, exponent, *, ranked):
    """`triton_gates.narrow`, arrays in and out."""
    from lexi_adapter.serving.kernels import triton_gates

    found = triton_gates.narrow(torch.from_numpy(weights), torch.from_numpy(ids), top_k, exponent, ranked=ranked)
    return [values.numpy() for values in found]
