"""The method in one launch: from router logits to shortlist, plan and lists, with the budget on the device.

| array           | shape     | role                                                                         |
|-----------------|-----------|------------------------------------------------------------------------------|
| logits          | [T, E]    | the router's                                                                 |
| row_weights     | [T]       | fp32; w_t of the score                                                       |
| settings        | [5]       | int32: valid rows, budget, truncates?, natural score?, protect root?         |
| coverage        | [1]       | fp32; above 0: the fewest experts with this share of the score, not a budget |
| arrived         | [1]       | int32, 0 before and after: how many programs have written their row          |
| ids, weights    | [2, T, K] | written: the router's own choice, best first, and the plan; 0 is dropped     |
| kept            | [E]       | written, bool: the shortlist                                                 |
| score           | [E]       | written, fp32: router probability summed over valid rows, unweighted         |
| ranked          | [E]       | scratch, fp32: what the shortlist is ranked by                               |
| slots           | [E, T]    | scratch, int16: where each row's plan names an expert, from 1; 0: nowhere    |
| experts, starts, pairs |    | written: see `lists.py`                                                      |

Grid (T,): every program scores all rows and finds the same shortlist, which is quicker than to wait for one that does,
and plans its own row; the last to be done makes the lists. All rows' logits, at most 64 by 256, lie in registers.
Everything that a slider moves is read from device memory, so that a captured graph follows it. Rows behind the valid
ones are padding: they score nothing, route nowhere. Equations and names are those of `moespec/budget.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_device, check_float, check_sizes
from kernels.choosing import best_slots, load_logits, softmax_parts, weigh
from kernels.lists import ExpertLists, block_sizes, num_warps, write_lists

_CHUNK = 16  # experts compared at a time with all others


class Rule(IntEnum):
    """How a family makes weights of the chosen experts' logits."""

    SOFTMAX = 0  # over all experts, as they are
    RENORMALISED = 1  # over all experts, divided by the sum of the chosen
    SOFTMAX_OF_CHOSEN = 2


@dataclass(frozen=True)
class Settings:
    """What may change between two launches, on the device. See the table above; a budget of E or more is none.

    Launches with the same settings come one after the other: they count their programs in `arrived_1`.
    """

    numbers_5: Tensor
    coverage_1: Tensor
    arrived_1: Tensor

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
        coverage_1 = torch.tensor([coverage], dtype=torch.float32, device=device)
        return cls(numbers_5, coverage_1, torch.zeros(1, dtype=torch.int32, device=device))


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
def _shortlist(
    ranked_E, is_root_E, ranked_ptr, budget, coverage, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """bool [BLOCK_E]: the `budget` experts of the highest rank, or the fewest that hold `coverage`, at least K."""
    experts_E = tl.arange(0, BLOCK_E)
    covers_E = tl.zeros((BLOCK_E,), tl.float32) + coverage > 0
    # In budget mode the root's own experts outrank all others; they count.
    ranked_E = tl.where(is_root_E & ~covers_E, float("inf"), ranked_E)
    # All programs write the same numbers: each reads its own or others like them.
    tl.store(ranked_ptr + experts_E, ranked_E, mask=experts_E < E)
    tl.debug_barrier()
    rank_CE = tl.zeros((CHUNK, BLOCK_E), tl.int32)
    above_CE = tl.zeros((CHUNK, BLOCK_E), tl.float32)  # the score of those that outrank an expert
    for start in tl.static_range(0, BLOCK_E, CHUNK):
        others = start + tl.arange(0, CHUNK)
        other = tl.load(ranked_ptr + others, mask=others < E, other=-1.0)[:, None]
        is_first = (other == ranked_E[None, :]) & (others[:, None] < experts_E[None, :])
        outranks = (other > ranked_E[None, :]) | is_first
        rank_CE += outranks.to(tl.int32)
        above_CE += tl.where(outranks, other, 0.0)
    rank_E, above_E = tl.sum(rank_CE, axis=0), tl.sum(above_CE, axis=0)
    total = tl.sum(tl.where(experts_E < E, ranked_E, 0.0), axis=0)
    is_covering_E = (above_E < coverage * total) | (rank_E < K) | is_root_E
    return tl.where(covers_E, is_covering_E, rank_E < tl.maximum(budget, K)) & (experts_E < E)


@triton.jit
def select_kernel(
    logits_ptr, row_weights_ptr, settings_ptr, coverage_ptr, arrived_ptr, ids_ptr, weights_ptr, kept_ptr, score_ptr,
    ranked_ptr, slots_ptr, experts_ptr, starts_ptr, pairs_ptr, T, stride_t,
    E: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr, NUM_LISTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, COPIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """See the head of this file."""
    row, rows_T, experts_E = tl.program_id(0), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    num_valid, budget = tl.minimum(tl.load(settings_ptr), T), tl.load(settings_ptr + 1)
    truncates, is_natural, protects = tl.load(settings_ptr + 2), tl.load(settings_ptr + 3), tl.load(settings_ptr + 4)
    coverage = tl.load(coverage_ptr)
    is_valid_T, is_expert_E = rows_T < num_valid, experts_E < E

    # P, the softmax over all experts, and its sums over the rows.
    logits_TE = load_logits(logits_ptr, rows_T, num_valid, stride_t, E, BLOCK_E)
    most_T, total_T = softmax_parts(logits_TE, is_valid_T)
    odds_TE = tl.exp(logits_TE - most_T[:, None])
    row_weight_T = tl.load(row_weights_ptr + rows_T, mask=is_valid_T, other=0.0)
    score_E = tl.sum(odds_TE * tl.where(is_valid_T, 1.0 / total_T, 0.0)[:, None], axis=0)
    ranked_E = tl.sum(odds_TE * (row_weight_T / total_T)[:, None], axis=0)
    if is_natural != 0:  # the score counts what would be used: each row's own top-k weights
        chosen_TE = (best_slots(logits_TE, E, K, BLOCK_E) < K) & is_valid_T[:, None]
        shares_TE = weigh(logits_TE, chosen_TE, most_T, total_T, RULE).to(weights_ptr.dtype.element_ty).to(tl.float32)
        ranked_E = tl.sum(shares_TE * row_weight_T[:, None], axis=0)

    # Rows by themselves lie in as many copies as there are warps: none waits for another at each of K choices.
    copies_C = tl.arange(0, COPIES)
    root_hits_E = tl.zeros((BLOCK_E,), tl.int32)
    if protects != 0:
        root_CE = load_logits(logits_ptr, copies_C * 0, num_valid, stride_t, E, BLOCK_E)
        root_hits_E = tl.max((best_slots(root_CE, E, K, BLOCK_E) < K).to(tl.int32), axis=0)
    kept_E = _shortlist(ranked_E, root_hits_E > 0, ranked_ptr, budget, coverage, E, K, BLOCK_E, CHUNK)

    # Even copies choose as the router does, odd ones as planned: truncation keeps the natural choice and drops what is
    # not kept; substitution chooses among the kept.
    is_own_C = copies_C % 2 == 0
    own_CE = load_logits(logits_ptr, copies_C * 0 + row, num_valid, stride_t, E, BLOCK_E)
    is_valid_C = copies_C * 0 + row < num_valid
    most_C, total_C = softmax_parts(own_CE, is_valid_C)
    is_free_CE = is_own_C[:, None] | kept_E[None, :]
    slots_CE = best_slots(tl.where(is_free_CE | (truncates != 0), own_CE, float("-inf")), E, K, BLOCK_E)
    chosen_CE = slots_CE < K
    lives_CE = chosen_CE & is_free_CE & is_valid_C[:, None]
    weights_CE = weigh(own_CE, lives_CE, most_C, total_C, RULE).to(weights_ptr.dtype.element_ty)
    at_CE, is_written_CE = (copies_C * T + row)[:, None] * K + slots_CE, chosen_CE & (copies_C < 2)[:, None]
    tl.store(ids_ptr + at_CE, tl.zeros_like(slots_CE) + experts_E[None, :], mask=is_written_CE)
    tl.store(weights_ptr + at_CE, weights_CE, mask=is_written_CE)
    named_CE = tl.where(lives_CE & (weights_CE != 0), slots_CE + 1, 0).to(tl.int16)
    at_slots_CE = (experts_E * T + row)[None, :] + copies_C[:, None] * 0
    tl.store(slots_ptr + at_slots_CE, named_CE, mask=is_expert_E[None, :] & (copies_C == 1)[:, None])
    tl.store(kept_ptr + experts_E, kept_E, mask=is_expert_E & (row == 0))
    tl.store(score_ptr + experts_E, score_E, mask=is_expert_E & (row == 0))

    tl.debug_barrier()  # this program's row is written by all of its threads
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == T - 1:
        tl.store(arrived_ptr, 0)
        is_inside_ET = is_expert_E[:, None] & (rows_T < T)[None, :]
        at_ET = experts_E[:, None] * T + rows_T[None, :]
        slots_ET = tl.load(slots_ptr + at_ET, mask=is_inside_ET, other=0, cache_modifier=".cg").to(tl.int32)
        write_lists(slots_ET, experts_ptr, starts_ptr, pairs_ptr, NUM_LISTS, K, BLOCK_T, BLOCK_E)


def select(
    logits_TE: Tensor, row_weights_T: Tensor, settings: Settings, top_k: int, rule: Rule, dtype: torch.dtype
) -> Selection:
    """Route the rows of a tree. logits [T, E], row weights fp32 [T]; weights are written in `dtype`.

    T at most 64, E at most 256. What the settings hold is not checked: it is on the device.
    """
    _check(logits_TE, row_weights_T, settings, top_k, dtype)
    (num_rows, num_experts), device = logits_TE.shape, logits_TE.device
    ids_2TK = torch.empty(2, num_rows, top_k, dtype=torch.int64, device=device)
    weights_2TK = torch.empty(2, num_rows, top_k, dtype=dtype, device=device)
    (natural_ids_TK, ids_TK), (natural_weights_TK, weights_TK) = ids_2TK.unbind(), weights_2TK.unbind()
    score_E, ranked_E = (torch.empty(num_experts, dtype=torch.float32, device=device) for _ in range(2))
    kept_E = torch.empty(num_experts, dtype=torch.bool, device=device)
    slots_ET = torch.empty(num_experts, num_rows, dtype=torch.int16, device=device)
    lists = ExpertLists.empty(weights_TK, num_experts)
    blocks = block_sizes(num_rows, num_experts)
    warps = num_warps(blocks)
    select_kernel[(num_rows,)](
        *(logits_TE, row_weights_T.contiguous(), settings.numbers_5, settings.coverage_1, settings.arrived_1),
        *(ids_2TK, weights_2TK, kept_E, score_E, ranked_E, slots_ET),
        *(lists.experts_A, lists.starts_A, lists.pairs_P, num_rows, logits_TE.stride(0)),
        E=num_experts,
        K=top_k,
        RULE=int(rule),
        NUM_LISTS=len(lists.experts_A),
        COPIES=max(2, warps),
        CHUNK=min(_CHUNK, blocks["BLOCK_E"]),
        **blocks,
        num_warps=warps,
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
    on_device = {"settings": settings.numbers_5, "coverage": settings.coverage_1, "arrived": settings.arrived_1}
    check_device(logits=logits_TE, row_weights=row_weights_T, **on_device)
