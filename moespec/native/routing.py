"""Routing and the budget as compiled CPU kernels: the formulas of `routing.py` and `budget.py`, one call per
layer, and the counts of `counts.py`, one call per step.

Tested against the same brute force as those. Knows nothing of models or configs: arrays and numbers in, arrays out.
`kind` numbers the router families as `routing.FAMILIES` lists them: 0 softmax, top-k, renormalised; 1 softmax, top-k;
2 top-k, softmax. Letters as in `types.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moespec.native.layers import FAST, F, exp


@njit(**FAST)
def _softmax(logits, probs):
    best = logits[0]
    for i in range(logits.shape[0]):
        best = max(best, logits[i])
    total = F(0)
    for i in range(logits.shape[0]):
        probs[i] = exp(max(logits[i] - best, F(-87)))
        total += probs[i]
    for i in range(logits.shape[0]):
        probs[i] /= total


@njit(cache=True)
def highest(values, allowed, ids):
    """The highest of the allowed values, best first, ties to the lower id. By insertion: most values fall at once."""
    found, size = 0, ids.shape[0]
    if size == 0:
        return
    for i in range(values.shape[0]):
        if not allowed[i] or (found == size and values[i] <= values[ids[size - 1]]):
            continue
        found = min(found + 1, size)
        place = found - 1
        while place > 0 and values[ids[place - 1]] < values[i]:
            ids[place] = ids[place - 1]
            place -= 1
        ids[place] = i


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
        highest(logits[row], everyone, ids[row])
        _weigh(logits[row], probs[row], ids[row], everyone, kind, weights[row])
    return probs, ids, weights


@njit(cache=True)
def plan(logits, probs, ids, weights, row_weights, roots, natural, protect_root, budget, coverage, truncates, kind):
    """`MoESpec.plan`: (ids [T, K], weights [T, K], shortlist [E], score [E]). `coverage` 0: the budget counts.

    roots: int64, the rows whose experts `protect_root` protects.
    """
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
        highest(score, everyone, order)
        size, mass, whole = 1, score[order[0]], score.sum()
        while size < num_experts and mass / whole < coverage:
            mass += score[order[size]]
            size += 1
        size = max(size, top_k)
    elif protect_root:
        above = 2 * score.sum()
        for root in roots:
            for slot in range(top_k):
                ranked[ids[root, slot]] = above + score[ids[root, slot]]
    chosen = np.empty(min(size, num_experts), np.int64)
    highest(ranked, everyone, chosen)
    kept = np.zeros(num_experts, np.bool_)
    for expert in chosen:
        kept[expert] = True
    if coverage > 0 and protect_root:
        for root in roots:
            for slot in range(top_k):
                kept[ids[root, slot]] = True
    new_ids = ids.copy()
    new_weights = np.empty_like(weights)
    for row in range(num_rows):
        if not truncates:
            highest(logits[row], kept, new_ids[row])
        _weigh(logits[row], probs[row], new_ids[row], kept, kind, new_weights[row])
    return new_ids, new_weights, kept, score


@njit(cache=True)
def plan_requests(logits, probs, ids, weights, row_weights, bounds, is_shared, settings, kind):
    """`plan` for the rows of each request, or for all together: (ids [T, K], weights [T, K], shortlists [R, E]).

    Request r has the rows from bounds[r] to bounds[r + 1] - 1, the first its root. Where a single row would be planned
    for, it keeps its own routing. settings: those of `plan` from `natural` on; a budget of -1: all keep theirs.
    """
    natural, protect_root, budget, coverage, truncates = settings
    new_ids, new_weights = ids.copy(), weights.copy()
    kept = np.ones((bounds.shape[0] - 1, logits.shape[1]), np.bool_)
    edges = np.array([0, logits.shape[0]]) if is_shared else bounds
    for number in range(edges.shape[0] - 1):
        first, last = edges[number], edges[number + 1]
        if budget < 0 or last - first < 2:
            continue
        roots = bounds[:-1] if is_shared else np.zeros(1, np.int64)
        new_ids[first:last], new_weights[first:last], kept[number], _ = plan(
            *(logits[first:last], probs[first:last], ids[first:last], weights[first:last], row_weights[first:last]),
            *(roots, natural, protect_root, budget, coverage, truncates, kind),
        )
    if is_shared:
        kept[1:] = kept[0]
    return new_ids, new_weights, kept


@njit(cache=True)
def count(logits, natural_ids, natural_weights, ids, weights, kept, is_natural, least_change):
    """`counts.count_routing` of L layers: (score [L, E], mass kept [L], natural, kept, active [L, E], missing [L, T],
    natural weight kept [L], whether some weight changed by more than `least_change`)."""
    num_layers, num_rows, num_experts = logits.shape
    score, mass = np.zeros((num_layers, num_experts), np.float32), np.ones(num_layers, np.float32)
    natural, active = np.zeros((num_layers, num_experts), np.bool_), np.zeros((num_layers, num_experts), np.bool_)
    missing, weight_kept = np.zeros((num_layers, num_rows), np.int64), np.empty(num_layers, np.float32)
    probs, ran, own = (
        np.empty(num_experts, np.float32),
        np.empty(num_experts, np.float32),
        np.empty(num_experts, np.float32),
    )
    largest_change = F(0)
    for n in range(num_layers):
        survives, whole = F(0), F(0)
        for row in range(num_rows):
            _softmax(logits[n, row], probs)
            for expert in range(num_experts):
                score[n, expert] += probs[expert]
                ran[expert], own[expert] = F(0), F(0)
            for slot in range(ids.shape[2]):
                ran[ids[n, row, slot]] += weights[n, row, slot]
                active[n, ids[n, row, slot]] |= is_natural or weights[n, row, slot] != 0
            for slot in range(natural_ids.shape[2]):
                expert, weight = natural_ids[n, row, slot], natural_weights[n, row, slot]
                natural[n, expert], own[expert] = True, weight
                whole += weight
                if is_natural or ran[expert] != 0:
                    survives += weight
                else:
                    missing[n, row] += 1
            for expert in range(num_experts):
                largest_change = max(largest_change, abs(ran[expert] - own[expert]))
        weight_kept[n] = survives / whole
        if not is_natural:
            mass[n] = score[n][kept[n]].sum() / score[n].sum()
    found = natural if is_natural else kept
    return score, mass, natural, found, active, missing, weight_kept, largest_change > least_change
