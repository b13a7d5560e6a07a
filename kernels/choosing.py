"""What rows of router logits choose by themselves: their best experts, and how much each of them counts.

Tiles are [R, BLOCK_E], a row in one piece; nothing is stored. Knows nothing of budgets, shortlists or lists.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_logits(logits_ptr, rows_R, num_valid, stride_t, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """fp32 [R, BLOCK_E], -inf outside. Padding is not read: whatever lies there, NaN included, stays there."""
    experts_E = tl.arange(0, BLOCK_E)
    is_inside_RE = (rows_R < num_valid)[:, None] & (experts_E < E)[None, :]
    at_RE = rows_R[:, None] * stride_t + experts_E[None, :]
    return tl.load(logits_ptr + at_RE, mask=is_inside_RE, other=float("-inf")).to(tl.float32)


@triton.jit
def best_slots(values_RE, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr):
    """int32 [R, BLOCK_E]: the place of each expert among its row's K largest values, ties to the lower id; K: none.

    Compared as whole numbers of the same order, for which a warp has an instruction. A zero's sign says nothing.
    """
    experts_E = tl.arange(0, BLOCK_E)
    bits_RE = tl.where(values_RE == 0, 0.0, values_RE).to(tl.int32, bitcast=True)
    # What is no expert, or is taken already, lies below -inf, and below NaN of either sign.
    keys_RE = tl.where(experts_E[None, :] < E, bits_RE ^ ((bits_RE >> 31) & 0x7FFFFFFF), -0x80000000)
    slots_RE = tl.zeros_like(keys_RE) + K
    for k in range(K):
        best_R = tl.max(keys_RE, axis=1)
        id_R = tl.min(tl.where(keys_RE == best_R[:, None], experts_E[None, :], BLOCK_E), axis=1)
        is_best_RE = experts_E[None, :] == id_R[:, None]
        slots_RE = tl.where(is_best_RE, k, slots_RE)
        keys_RE = tl.where(is_best_RE, -0x80000000, keys_RE)
    return slots_RE


@triton.jit
def weigh(logits_RE, survives_RE, most_R, total_R, RULE: tl.constexpr):
    """The family's weights of the chosen, fp32 [R, BLOCK_E], 0 where `survives` is False.

    exp(logit - most) / total is the softmax over all experts.
    """
    if RULE == 2:
        most_R = tl.max(tl.where(survives_RE, logits_RE, -1e30), axis=1)
    values_RE = tl.where(survives_RE, tl.exp(logits_RE - most_R[:, None]), 0.0)
    if RULE == 2:
        return values_RE / tl.maximum(tl.sum(values_RE, axis=1), 1e-30)[:, None]
    values_RE = values_RE / total_R[:, None]
    if RULE == 1:
        # The clamp makes a row whose every expert was dropped an exact zero, not NaN.
        values_RE = values_RE / tl.maximum(tl.sum(values_RE, axis=1), 1e-9)[:, None]
    return values_RE


@triton.jit
def softmax_parts(logits_RE, is_valid_R):
    """(most, total) [R] of the softmax over all experts. A padded row has no finite logit: no NaN comes of it."""
    most_R = tl.where(is_valid_R, tl.max(logits_RE, axis=1), 0.0)
    return most_R, tl.where(is_valid_R, tl.sum(tl.exp(logits_RE - most_R[:, None]), axis=1), 1.0)
