"""Slow, obvious NumPy float64 references for one MoE layer: loops over tokens and experts, with no code in common."""

import math

import numpy as np


def erf_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x, alpha=1.0):
    return x / (1 + np.exp(-alpha * x))


ACTIVATIONS = {
    "silu": silu,
    "gelu": erf_gelu,
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def softmax(x):
    powers = np.exp(x - x.max())
    return powers / powers.sum()


SCORES = {
    "softmax": softmax,
    "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
    "sqrtsoftplus": lambda logits: np.sqrt(np.log1p(np.exp(logits))),
}


def choose(x, router, bias, routing, top_k):
    """One token: (expert indices, best first; scores of all experts)."""
    logits = router @ x + (bias if routing.bias == "logits" else 0)
    if routing.scoring == "sparsemixer":
        return choose_in_turn(logits, routing.jitter, top_k)
    scores = SCORES[routing.scoring](logits)
    keys = scores + bias if routing.bias == "selection" else scores
    if routing.num_groups > 1:
        groups = keys.reshape(routing.num_groups, -1)
        group_scores = [
            sorted(group)[-1] if routing.group_score == "max" else sum(sorted(group)[-2:]) for group in groups
        ]
        kept = np.argsort(group_scores)[::-1][: routing.topk_groups]
        keys = np.concatenate([group if i in kept else np.full_like(group, -np.inf) for i, group in enumerate(groups)])
    return np.argsort(-keys, kind="stable")[:top_k], scores


def choose_in_turn(logits, jitter, top_k):
    scores, chosen = np.zeros(len(logits)), []
    for _ in range(top_k):
        best = max((e for e in range(len(logits)) if e not in chosen), key=lambda e: logits[e])
        near = [
            e
            for e in range(len(logits))
            if e not in chosen and (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) <= 2 * jitter
        ]
        scores[best] = 1 / sum(math.exp(logits[e] - logits[best]) for e in near)
        chosen.append(best)
    return chosen, scores


def run_expert(x, expert, activation):
    """One row through one expert: (gate or None, up, down), or these and their three biases."""
    gate, up, down, gate_bias, up_bias, down_bias, bound = (*expert, 0, 0, 0, 0)[:7]
    bound = bound or np.inf
    function = ACTIVATIONS[activation.name]
    lifted = up @ x + up_bias
    if gate is None:
        return down @ function(lifted) + down_bias
    gated = gate @ x + gate_bias
    if activation.limit is not None:
        gated, lifted = np.minimum(gated, activation.limit), np.clip(lifted, -activation.limit, activation.limit)
    gated = silu(gated, activation.alpha) if activation.alpha != 1 else function(gated)
    gated, lifted = np.minimum(gated, bound), np.clip(lifted, -bound, bound)
    return down @ (gated * (lifted + activation.up_offset)) + down_bias


def moe_output(x, router, bias, experts, routing, activation, k):
    """Outputs of one layer at top-k, [tokens, hidden] float64."""
    output = np.zeros(x.shape)
    for t, token in enumerate(x):
        chosen, scores = choose(token, router, bias, routing, k)
        total = max(sum(scores[e] for e in chosen) + routing.epsilon, routing.norm_min) if routing.renormalize else 1
        for e in chosen:
            if routing.scales_input:
                output[t] += routing.scale * run_expert(scores[e] * token, experts[e], activation)
            else:
                output[t] += routing.scale * scores[e] / total * run_expert(token, experts[e], activation)
    return output


def weigh(x, router, bias, routing, top_k):
    """(One token's experts at the layer's own `top_k`, best first; the weights of all experts, 0 for others)."""
    chosen, scores = choose(x, router, bias, routing, top_k)
    total = max(sum(scores[e] for e in chosen) + routing.epsilon, routing.norm_min) if routing.renormalize else 1
    weights = np.zeros(len(scores))
    for e in chosen:
        weights[e] = routing.scale * (1 if routing.scales_input else scores[e] / total)
    return chosen, weights


def find_features(x, router, bias, routing, top_k, k):
    """[tokens, 3 x experts] at k of `top_k`: logits, weights of the kept experts, weights of the dropped ones."""
    experts = len(router)
    features = np.zeros((len(x), 3 * experts))
    for t, token in enumerate(x):
        chosen, weights = weigh(token, router, bias, routing, top_k)
        features[t, :experts] = router @ token + (bias if routing.bias == "logits" else 0)
        for rank, e in enumerate(chosen):
            features[t, (1 if rank < k else 2) * experts + e] = weights[e]
    return features


def fit_ridge(features, rest, folds, ridges):
    """The affine map [features + 1, hidden], constant last, by the ridge with which each fold predicts the other best.

    Ridges are of features scaled to unit variance; one that does not vary is left out.
    """

    def solve(rows, ridge):
        own, target = features[rows], rest[rows]
        mean, scale = own.mean(0), own.std(0)
        varies = scale > 1e-3 * scale.max()
        scaled = np.where(varies, (own - mean) / np.where(varies, scale, 1), 0)
        normal = scaled.T @ scaled / len(own) + ridge * np.eye(len(mean))
        weights = np.linalg.solve(normal, scaled.T @ (target - target.mean(0)) / len(own))
        weights = np.where(varies[:, None], weights / np.where(varies, scale, 1)[:, None], 0)
        return np.vstack([weights, target.mean(0) - mean @ weights])

    def miss(ridge):
        halves = [solve(folds == fold, ridge) for fold in (0, 1)]
        predict = [features[folds != fold] @ half[:-1] + half[-1] for fold, half in enumerate(halves)]
        return sum(((rest[folds != fold] - predict[fold]) ** 2).sum(1).mean() for fold in (0, 1))

    return solve(np.full(len(features), True), min(ridges, key=miss))


def cut_rank(features, solution, rank):
    """The affine map with its linear part cut to the `rank` directions in which the values that it fits vary most."""
    fitted = (features - features.mean(0)) @ solution[:-1]
    _, _, directions = np.linalg.svd(fitted, full_matrices=False)
    weights = solution[:-1] @ directions[:rank].T @ directions[:rank]
    return np.vstack([weights, solution[-1] + features.mean(0) @ (solution[:-1] - weights)])
