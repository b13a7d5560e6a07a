"""A whole decoder of MoE layers as one compiled call: attention, routing, the budget, experts, layer after layer.

For steps whose policy is the router's own or MoE-Spec; other policies get a call per layer (`lean.py`). Letters as in
`types.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moespec.native.attention import FIRST, attention
from moespec.native.experts import experts
from moespec.native.layers import FAST, linear, unit_rows
from moespec.native.routing import plan_requests, route


@njit(**FAST)
def decode(hidden, layers, tables, final, eps, cos, sin, seen, router, budget, row_weights, keep):
    """Logits [keep, V] of the last rows of hidden [T, D], and everything about their routing.

    layers: per layer (input norm, qkv, query and key norms, out, MLP norm, router, gate_up, down), as in `attention`
    and `experts`; tables [L, R, 7]: each layer's for `attention`; final: (norm, lm_head);
    router: (top-k, kind of family, attention's scale); budget: whether all requests share a shortlist, and the settings
    of `plan_requests`.
    Returns (logits, residuals entering each layer [L, T, D], router logits [L, T, E], natural ids and weights
    [L, T, K], ids and weights that ran [L, T, K], shortlists [R, L, E]).
    """
    top_k, kind, scale = router
    is_shared, settings = budget
    num_layers, num_rows, num_experts = len(layers), hidden.shape[0], layers[0][5][1].shape[0]
    bounds = np.append(tables[0, :, FIRST], num_rows)
    entering = np.empty((num_layers, num_rows, hidden.shape[1]), np.float32)
    logits = np.empty((num_layers, num_rows, num_experts), np.float32)
    ids = np.empty((num_layers, num_rows, top_k), np.int64)
    run_ids = np.empty_like(ids)
    weights = np.empty((num_layers, num_rows, top_k), np.float32)
    run_weights = np.empty_like(weights)
    kept = np.empty((bounds.shape[0] - 1, num_layers, num_experts), np.bool_)
    for n in range(num_layers):
        input_norm, qkv, norms, out, mlp_norm, router_weight, gate_up, down = layers[n]
        entering[n] = hidden
        x = unit_rows(hidden, input_norm, eps)
        hidden = hidden + attention(x, qkv, norms, eps, out, cos, sin, tables[n], seen, scale)
        x = unit_rows(hidden, mlp_norm, eps)
        logits[n] = linear(x, router_weight)
        probs, ids[n], weights[n] = route(logits[n], top_k, kind)
        run_ids[n], run_weights[n], kept[:, n] = plan_requests(
            logits[n], probs, ids[n], weights[n], row_weights, bounds, is_shared, settings, kind
        )
        hidden = hidden + experts(x, run_ids[n], run_weights[n], gate_up, down)
    norm, lm_head = final
    last = unit_rows(hidden[hidden.shape[0] - keep :], norm, eps)
    return linear(last, lm_head), entering, logits, ids, weights, run_ids, run_weights, kept
