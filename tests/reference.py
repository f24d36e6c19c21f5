"""Slow, obvious NumPy float64 references for one MoE layer: loops over tokens and experts, nothing shared with JAX."""

import math

import numpy as np


def erf_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACTIVATIONS = {"silu": lambda x: x / (1 + np.exp(-x)), "gelu": erf_gelu, "relu": lambda x: np.maximum(x, 0)}


def choose(x, router, bias, routing, top_k):
    """One token: (expert indices, best first; scores of all experts)."""
    logits = router @ x
    scores = np.exp(logits - logits.max())
    scores = scores / scores.sum() if routing.scoring == "softmax" else 1 / (1 + np.exp(-logits))
    keys = scores if bias is None else scores + bias
    if routing.num_groups > 1:
        groups = keys.reshape(routing.num_groups, -1)
        judged = [sorted(group)[-1] if routing.group_score == "max" else sum(sorted(group)[-2:]) for group in groups]
        kept = np.argsort(judged)[::-1][: routing.topk_groups]
        keys = np.concatenate([group if i in kept else np.full_like(group, -np.inf) for i, group in enumerate(groups)])
    return np.argsort(-keys, kind="stable")[:top_k], scores


def moe_output(x, router, bias, experts, routing, activation, k):
    """Outputs of one layer at top-k, [tokens, hidden] float64; `experts` is a list of (gate, up, down)."""
    output = np.zeros(x.shape)
    for t, token in enumerate(x):
        chosen, scores = choose(token, router, bias, routing, k)
        total = sum(scores[e] for e in chosen) if routing.renormalize else 1.0
        for e in chosen:
            gate, up, down = experts[e]
            hidden = ACTIVATIONS[activation](gate @ token) * (up @ token)
            output[t] += routing.scale * scores[e] / total * (down @ hidden)
    return output
