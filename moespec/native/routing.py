"""Routing and the budget as compiled CPU kernels: the formulas of `routing.py` and `budget.py`, one call per layer.

Tested against the same brute force as those. Knows nothing of models or configs: arrays and numbers in, arrays out.
`kind` numbers the router families as `routing.FAMILIES` lists them: 0 softmax, top-k, renormalised; 1 softmax, top-k;
2 top-k, softmax. Letters as in `types.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

F = np.float32


@njit(cache=True)
def _softmax(logits, probs):
    best = logits.max()
    total = F(0)
    for i in range(logits.shape[0]):
        probs[i] = np.exp(logits[i] - best)
        total += probs[i]
    for i in range(logits.shape[0]):
        probs[i] /= total


@njit(cache=True)
def _best(values, allowed, ids):
    """The highest of the allowed values, ties to the lower id."""
    taken = ~allowed
    for slot in range(ids.shape[0]):
        best = -1
        for i in range(values.shape[0]):
            if not taken[i] and (best < 0 or values[i] > values[best]):
                best = i
        ids[slot] = best
        taken[best] = True


@njit(cache=True)
def _weigh(logits, probs, ids, kept, kind, weights):
    """The family's weights of one row's choice, 0 outside `kept`."""
    total = F(0)
    best = F(-np.inf)
    for slot in range(ids.shape[0]):
        if kept[ids[slot]]:
            best = max(best, logits[ids[slot]])
    for slot in range(ids.shape[0]):
        expert = ids[slot]
        weights[slot] = F(0)
        if kept[expert]:
            weights[slot] = np.exp(logits[expert] - best) if kind == 2 else probs[expert]
        total += weights[slot]
    if kind != 1:
        for slot in range(ids.shape[0]):
            weights[slot] /= max(total, F(1e-9))


@njit(cache=True)
def route(logits, top_k, kind):
    """The router's own choice: (probabilities [T, E], ids [T, K], weights [T, K])."""
    num_rows, num_experts = logits.shape
    probs = np.empty_like(logits)
    ids = np.empty((num_rows, top_k), np.int64)
    weights = np.empty((num_rows, top_k), np.float32)
    everyone = np.ones(num_experts, np.bool_)
    for row in range(num_rows):
        _softmax(logits[row], probs[row])
        _best(logits[row], everyone, ids[row])
        _weigh(logits[row], probs[row], ids[row], everyone, kind, weights[row])
    return probs, ids, weights


@njit(cache=True)
def plan(logits, probs, ids, weights, row_weights, natural, protect_root, budget, coverage, truncates, kind):
    """`MoESpec.plan`: (ids [T, K], weights [T, K], shortlist [E], score [E]). `coverage` 0: the budget counts."""
    num_rows, num_experts = logits.shape
    top_k = ids.shape[1]
    score = np.zeros(num_experts, np.float32)
    for row in range(num_rows):
        if natural:
            for slot in range(top_k):
                score[ids[row, slot]] += row_weights[row] * weights[row, slot]
        else:
            for expert in range(num_experts):
                score[expert] += row_weights[row] * probs[row, expert]
    everyone = np.ones(num_experts, np.bool_)
    ranked = score.copy()
    size = max(budget, top_k)
    if coverage > 0:
        order = np.empty(num_experts, np.int64)
        _best(score, everyone, order)
        size, mass, whole = 1, score[order[0]], score.sum()
        while size < num_experts and mass / whole < coverage:
            mass += score[order[size]]
            size += 1
        size = max(size, top_k)
    elif protect_root:
        for slot in range(top_k):
            ranked[ids[0, slot]] = np.inf
    chosen = np.empty(min(size, num_experts), np.int64)
    _best(ranked, everyone, chosen)
    kept = np.zeros(num_experts, np.bool_)
    for expert in chosen:
        kept[expert] = True
    if coverage > 0 and protect_root:
        for slot in range(top_k):
            kept[ids[0, slot]] = True
    new_ids = ids.copy()
    new_weights = np.empty_like(weights)
    for row in range(num_rows):
        if not truncates:
            _best(logits[row], kept, new_ids[row])
        _weigh(logits[row], probs[row], new_ids[row], kept, kind, new_weights[row])
    return new_ids, new_weights, kept, score
