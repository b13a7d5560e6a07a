"""The method in one launch: from router logits to shortlist, plan and lists, with the budget on the device.

| array           | shape  | role                                                                        |
|-----------------|--------|-----------------------------------------------------------------------------|
| logits          | [T, E] | the router's                                                                |
| row_weights     | [T]    | fp32; w_t of the score                                                      |
| settings        | [5]    | int32: valid rows, budget, truncates?, natural score?, protect root?        |
| coverage        | [1]    | fp32; above 0: the fewest experts with this share of the score, not a budget |
| natural_ids     | [T, K] | written: the router's own choice, best first; natural_weights its weights   |
| ids, weights    | [T, K] | written: the plan; weight 0 is dropped                                      |
| kept            | [E]    | written, bool: the shortlist                                                |
| score           | [E]    | written, fp32: router probability summed over valid rows, unweighted        |
| ranked          | [E]    | scratch, fp32: what the shortlist is ranked by                              |
| experts, starts, pairs |  | written: see `lists.py`                                                     |

Grid (1,): one program holds [T, E], at most 64 by 256, in registers. Everything that a slider moves is read from device
memory, so that a captured graph follows it. Rows behind the valid ones are padding: they score nothing, route nowhere.
Equations and names are those of `moespec/budget.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_device, check_float, check_sizes
from kernels.lists import ExpertLists, block_sizes, column, num_warps, write_lists

_CHUNK = 16  # experts compared at a time with all others: 32 spilled registers


class Rule(IntEnum):
    """How a family makes weights of the chosen experts' logits."""

    SOFTMAX = 0  # over all experts, as they are
    RENORMALISED = 1  # over all experts, divided by the sum of the chosen
    SOFTMAX_OF_CHOSEN = 2


@dataclass(frozen=True)
class Settings:
    """What may change between two launches, on the device. See the table above; a budget of E or more is none."""

    numbers_5: Tensor
    coverage_1: Tensor

    @classmethod
    def on(
        cls,
        device: torch.device,
        num_rows: int,
        budget: int,
        *,
        truncates: bool = False,
        natural: bool = False,
        protect_root: bool = False,
        coverage: float = 0.0,
    ) -> Settings:
        """num_rows: those that are valid; the rest as in the table. ValueError for what no layer could mean.

        A budget below a layer's top-k keeps its top-k; at the number of experts or above, nothing is dropped.
        """
        if budget < 1:
            raise ValueError(f"budget={budget} is not allowed: use 1 or more; the kernel keeps top-k experts at least.")
        if not 0 <= coverage <= 1:
            raise ValueError(f"coverage={coverage} is not allowed: use 0, which is none, to 1.")
        numbers = [num_rows, budget, int(truncates), int(natural), int(protect_root)]
        numbers_5 = torch.tensor(numbers, dtype=torch.int32, device=device)
        return cls(numbers_5, torch.tensor([coverage], dtype=torch.float32, device=device))


@dataclass(frozen=True)
class Selection:
    """What `select` writes."""

    natural_ids_TK: Tensor
    natural_weights_TK: Tensor
    ids_TK: Tensor
    kept_E: Tensor
    score_E: Tensor
    lists: ExpertLists

    @property
    def weights_TK(self) -> Tensor:
        return self.lists.weights_TK


@triton.jit
def _load(logits_ptr, num_valid, stride_t, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """fp32 [BLOCK_T, BLOCK_E], -inf outside. Padding is not read: whatever lies there, NaN included, stays there."""
    rows_T, experts_E = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    is_inside_TE = (rows_T < num_valid)[:, None] & (experts_E < E)[None, :]
    at_TE = rows_T[:, None] * stride_t + experts_E[None, :]
    return tl.load(logits_ptr + at_TE, mask=is_inside_TE, other=float("-inf")).to(tl.float32)


@triton.jit
def _best(values_TE, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):
    """Each row's K largest values, best first, ties to the lower id: ids int32 and values [BLOCK_T, BLOCK_K]."""
    experts_E, slots_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    ids_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    best_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for k in range(K):
        best_T, id_T = tl.max(values_TE, axis=1, return_indices=True, return_indices_tie_break_left=True)
        ids_TK = tl.where(slots_K[None, :] == k, id_T[:, None], ids_TK)
        best_TK = tl.where(slots_K[None, :] == k, best_T[:, None], best_TK)
        values_TE = tl.where(experts_E[None, :] == id_T[:, None], float("-inf"), values_TE)
    return ids_TK, best_TK


@triton.jit
def _weigh(logits_TK, survives_TK, most_T, total_T, RULE: tl.constexpr):
    """The family's weights of the chosen, fp32 [BLOCK_T, BLOCK_K], 0 where `survives` is False.

    exp(logit - most) / total is the softmax over all experts.
    """
    if RULE == 2:
        most_T = tl.max(tl.where(survives_TK, logits_TK, -1e30), axis=1)
    values_TK = tl.where(survives_TK, tl.exp(logits_TK - most_T[:, None]), 0.0)
    if RULE == 2:
        return values_TK / tl.maximum(tl.sum(values_TK, axis=1), 1e-30)[:, None]
    values_TK = values_TK / total_T[:, None]
    if RULE == 1:
        # The clamp makes a row whose every expert was dropped an exact zero, not NaN.
        values_TK = values_TK / tl.maximum(tl.sum(values_TK, axis=1), 1e-9)[:, None]
    return values_TK


@triton.jit
def _shortlist(
    ranked_E, is_root_E, ranked_ptr, budget, coverage, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """bool [BLOCK_E]: the `budget` experts of the highest rank, or the fewest that hold `coverage`, at least K."""
    experts_E = tl.arange(0, BLOCK_E)
    covers_E = tl.zeros((BLOCK_E,), tl.float32) + coverage > 0
    # In budget mode the root's own experts outrank all others; they count.
    ranked_E = tl.where(is_root_E & ~covers_E, float("inf"), ranked_E)
    tl.store(ranked_ptr + experts_E, ranked_E, mask=experts_E < E)
    tl.debug_barrier()
    rank_E = tl.zeros((BLOCK_E,), tl.int32)
    above_E = tl.zeros((BLOCK_E,), tl.float32)  # the score of all that outrank an expert
    for start in range(0, BLOCK_E, CHUNK):
        others = start + tl.arange(0, CHUNK)
        other = tl.load(ranked_ptr + others, mask=others < E, other=-1.0)
        is_higher = other[None, :] > ranked_E[:, None]
        is_first = (other[None, :] == ranked_E[:, None]) & (others[None, :] < experts_E[:, None])
        rank_E += tl.sum((is_higher | is_first).to(tl.int32), axis=1)
        above_E += tl.sum(tl.where(is_higher | is_first, other[None, :], 0.0), axis=1)
    total = tl.sum(tl.where(experts_E < E, ranked_E, 0.0), axis=0)
    is_covering_E = (above_E < coverage * total) | (rank_E < K) | is_root_E
    return tl.where(covers_E, is_covering_E, rank_E < tl.maximum(budget, K)) & (experts_E < E)


@triton.jit
def select_kernel(
    logits_ptr, row_weights_ptr, settings_ptr, coverage_ptr, natural_ids_ptr, natural_weights_ptr, ids_ptr, weights_ptr,
    kept_ptr, score_ptr, ranked_ptr, experts_ptr, starts_ptr, pairs_ptr, T, stride_t,
    E: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr, NUM_LISTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """See the head of this file."""
    rows_T, experts_E, slots_K = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    num_valid, budget = tl.minimum(tl.load(settings_ptr), T), tl.load(settings_ptr + 1)
    truncates, is_natural, protects = tl.load(settings_ptr + 2), tl.load(settings_ptr + 3), tl.load(settings_ptr + 4)
    coverage = tl.load(coverage_ptr)
    is_valid_T = rows_T < num_valid
    logits_TE = _load(logits_ptr, num_valid, stride_t, E, BLOCK_T, BLOCK_E)
    at_TK = rows_T[:, None] * K + slots_K[None, :]
    is_inside_TK = (rows_T < T)[:, None] & (slots_K < K)[None, :]
    chosen_TK = (slots_K < K)[None, :] & is_valid_T[:, None]

    # P, the softmax over all experts, and its sums over the rows. A padded row has no finite logit: no NaN comes of it.
    most_T = tl.where(is_valid_T, tl.max(logits_TE, axis=1), 0.0)
    odds_TE = tl.exp(logits_TE - most_T[:, None])
    total_T = tl.where(is_valid_T, tl.sum(odds_TE, axis=1), 1.0)
    row_weight_T = tl.load(row_weights_ptr + rows_T, mask=is_valid_T, other=0.0)
    score_E = tl.sum(odds_TE * tl.where(is_valid_T, 1.0 / total_T, 0.0)[:, None], axis=0)
    ranked_E = tl.sum(odds_TE * (row_weight_T / total_T)[:, None], axis=0)

    ids_TK, best_TK = _best(logits_TE, K, BLOCK_T, BLOCK_E, BLOCK_K)
    weights_TK = _weigh(best_TK, chosen_TK, most_T, total_T, RULE).to(weights_ptr.dtype.element_ty)
    tl.store(natural_ids_ptr + at_TK, ids_TK, mask=is_inside_TK)
    tl.store(natural_weights_ptr + at_TK, weights_TK, mask=is_inside_TK)
    if is_natural != 0:  # the score counts what would be used: each row's own top-k weights
        ranked_E = tl.zeros((BLOCK_E,), tl.float32)
        for k in range(K):
            weight_T = column(weights_TK.to(tl.float32), slots_K, k) * row_weight_T
            hit_TE = experts_E[None, :] == column(ids_TK, slots_K, k)[:, None]
            ranked_E += tl.sum(tl.where(hit_TE, weight_T[:, None], 0.0), axis=0)
    root_hits_E = tl.zeros((BLOCK_E,), tl.int32)
    for k in range(K):
        root_id = tl.sum(tl.where(rows_T == 0, column(ids_TK, slots_K, k), 0), axis=0)
        root_hits_E += (experts_E == root_id).to(tl.int32)
    kept_E = _shortlist(ranked_E, root_hits_E * protects > 0, ranked_ptr, budget, coverage, E, K, BLOCK_E, CHUNK)

    # Truncation keeps the natural choice and drops what is not kept; substitution chooses again among the kept.
    if (coverage > 0) | (budget < E):
        survives_TK = chosen_TK
        if truncates != 0:
            for k in range(K):
                hit_TE = experts_E[None, :] == column(ids_TK, slots_K, k)[:, None]
                is_kept_T = tl.sum((hit_TE & kept_E[None, :]).to(tl.int32), axis=1) > 0
                survives_TK = survives_TK & ((slots_K != k)[None, :] | is_kept_T[:, None])
        else:
            # Read again: kept in registers until here, the logits would push others out to memory.
            logits_TE = _load(logits_ptr, num_valid, stride_t, E, BLOCK_T, BLOCK_E)
            ids_TK, best_TK = _best(tl.where(kept_E[None, :], logits_TE, float("-inf")), K, BLOCK_T, BLOCK_E, BLOCK_K)
        weights_TK = _weigh(best_TK, survives_TK, most_T, total_T, RULE).to(weights_ptr.dtype.element_ty)
    tl.store(ids_ptr + at_TK, ids_TK, mask=is_inside_TK)
    tl.store(weights_ptr + at_TK, weights_TK, mask=is_inside_TK)
    tl.store(kept_ptr + experts_E, kept_E, mask=experts_E < E)
    tl.store(score_ptr + experts_E, score_E, mask=experts_E < E)
    lives_TK = ((weights_TK != 0) & chosen_TK).to(tl.int32)
    write_lists(ids_TK, lives_TK, experts_ptr, starts_ptr, pairs_ptr, NUM_LISTS, K, BLOCK_K, BLOCK_T, BLOCK_E)


def select(
    logits_TE: Tensor, row_weights_T: Tensor, settings: Settings, top_k: int, rule: Rule, dtype: torch.dtype
) -> Selection:
    """Route the rows of a tree. logits [T, E], row weights fp32 [T]; weights are written in `dtype`.

    T at most 64, E at most 256. What the settings hold is not checked: it is on the device.
    """
    _check(logits_TE, row_weights_T, settings, top_k, dtype)
    (num_rows, num_experts), device = logits_TE.shape, logits_TE.device
    natural_ids_TK, ids_TK = (torch.empty(num_rows, top_k, dtype=torch.int64, device=device) for _ in range(2))
    natural_weights_TK, weights_TK = (torch.empty(num_rows, top_k, dtype=dtype, device=device) for _ in range(2))
    score_E, ranked_E = (torch.empty(num_experts, dtype=torch.float32, device=device) for _ in range(2))
    kept_E = torch.empty(num_experts, dtype=torch.bool, device=device)
    lists = ExpertLists.empty(weights_TK, num_experts)
    blocks = block_sizes(num_rows, num_experts, top_k)
    select_kernel[(1,)](
        *(logits_TE, row_weights_T.contiguous(), settings.numbers_5, settings.coverage_1),
        *(natural_ids_TK, natural_weights_TK, ids_TK, weights_TK, kept_E, score_E, ranked_E),
        *(lists.experts_A, lists.starts_A, lists.pairs_P, num_rows, logits_TE.stride(0)),
        E=num_experts,
        K=top_k,
        RULE=int(rule),
        NUM_LISTS=len(lists.experts_A),
        CHUNK=min(_CHUNK, blocks["BLOCK_E"]),
        **blocks,
        num_warps=num_warps(blocks),
    )
    return Selection(natural_ids_TK, natural_weights_TK, ids_TK, kept_E, score_E, lists)


def _check(logits_TE: Tensor, row_weights_T: Tensor, settings: Settings, top_k: int, dtype: torch.dtype) -> None:
    if logits_TE.dim() != 2 or logits_TE.stride(1) != 1:
        found = f"{tuple(logits_TE.shape)} of strides {logits_TE.stride()}"
        raise ValueError(f"logits {found} are not [T, E] with each row in one piece.")
    check_float("logits", logits_TE.dtype)
    check_float("weights", dtype)
    check_sizes(len(logits_TE), logits_TE.shape[1], top_k)
    if row_weights_T.shape != logits_TE.shape[:1] or row_weights_T.dtype != torch.float32:
        found = f"{tuple(row_weights_T.shape)} of {row_weights_T.dtype}"
        raise ValueError(f"row weights {found} are not [{len(logits_TE)}] of float32.")
    check_device(logits=logits_TE, row_weights=row_weights_T, settings=settings.numbers_5, coverage=settings.coverage_1)
