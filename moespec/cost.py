"""What a verify step must read, how long that takes at the least, and when speculation pays. Pure Python, no torch.

Owns the limit formulae: every figure from here is modelled, a floor and not a measurement. Knows nothing of machines
(bandwidth comes in as an argument), of loaded models or of how many experts a router really uses.

Letters: L MoE layers, E experts, K top-k, D hidden size, F expert FFN size, V vocabulary, T rows of a step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BF16_BYTES = 2  # per weight
MXFP4_BYTES = 4.25 / 8  # per weight: 4 bits, and an 8-bit scale for every 32 weights


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a model's step depends on.

    dense_bytes, dense_weights    all that every step reads whatever the routing: attention, routers, lm_head
    expert_bytes, expert_weights  one expert of one layer, all its matrices
    """

    name: str
    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_ffn_size: int
    dense_bytes: int
    expert_bytes: int
    dense_weights: int
    expert_weights: int

    def __post_init__(self) -> None:
        assert 1 <= self.top_k <= self.num_experts


def expected_union(num_experts: int, top_k: int, num_rows: float) -> float:
    """U(T) = E (1 - (1 - K/E)^T): the experts that T rows use together where routing is uniform and independent.

    An upper bound for a real router: experts that are preferred, or that neighbouring rows share, make the union
    smaller. (Rows that avoided one another's experts would exceed it.)
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} is not allowed: use 1 to {num_experts}, the number of experts.")
    if num_rows < 0:
        raise ValueError(f"num_rows={num_rows} is not allowed: use 0 or more.")
    return num_experts * (1 - (1 - top_k / num_experts) ** num_rows)


def equivalent_rows(num_experts: int, top_k: int, union: float) -> float:
    """How many rows of uniform, independent routing have this union: the inverse of `expected_union`.

    Trees are worth fewer rows than they have. ValueError outside [K, E); all experts would take rows without end.
    """
    if not top_k <= union < num_experts:
        raise ValueError(f"union={union} is not allowed: use {top_k}, the top-k, to below {num_experts}, the experts.")
    return math.log1p(-union / num_experts) / math.log1p(-top_k / num_experts)


def union_between(num_experts: int, top_k: int, measured: Mapping[int, float], num_rows: float) -> float:
    """The union of `num_rows` rows (1 or more), given the `measured` unions of other numbers of rows above 1.

    Between two of them, one row with K experts included, the equivalent rows follow a power of the rows; beyond the
    last, the power between one row and the last. So the curve never falls, and never reaches all experts.
    """
    if top_k == num_experts:
        return num_experts
    points = [(math.log(rows), math.log(equivalent_rows(num_experts, top_k, measured[rows]))) for rows in measured]
    points = [(0.0, 0.0), *sorted(points)]
    assert len(points) > 1, "nothing was measured: expected_union is the bound"
    x, last = math.log(num_rows), len(points) - 1
    upper = next((n for n, point in enumerate(points) if n and x <= point[0]), None)
    (x0, y0), (x1, y1) = (points[0], points[last]) if upper is None else (points[upper - 1], points[upper])
    equivalent = math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return num_experts * -math.expm1(equivalent * math.log1p(-top_k / num_experts))


def budget_ladder(top_k: int, num_experts: int) -> list[int]:
    """Budgets worth comparing: k, 1.5 k, 2 k, 3 k, 4 k, 6 k and so on, below all experts."""
    steps = {top_k * 2**n * halves // 2 for n in range(num_experts.bit_length()) for halves in (2, 3)}
    return sorted(budget for budget in steps if budget < num_experts)


def layer_bytes(shape: ModelShape, num_experts_read: float) -> float:
    """Expert weights that one MoE layer reads: n * 3DFb. ValueError outside [0, E]."""
    if not 0 <= num_experts_read <= shape.num_experts:
        raise ValueError(
            f"num_experts_read={num_experts_read} is not allowed: {shape.name} has 0 to {shape.num_experts} to read."
        )
    return num_experts_read * shape.expert_bytes


def step_bytes(shape: ModelShape, num_experts_read: float, kv_bytes: float = 0) -> float:
    """dense_bytes + L * n * 3DFb + kv_bytes. `num_experts_read` is n, per layer: a mean over the layers may stand for
    it. Plain decoding reads `shape.top_k`.
    """
    if kv_bytes < 0:
        raise ValueError(f"kv_bytes={kv_bytes} is not allowed: use 0 or more.")
    return shape.dense_bytes + shape.num_moe_layers * layer_bytes(shape, num_experts_read) + kv_bytes


def step_flops(shape: ModelShape, num_rows: float) -> float:
    """Two for every weight that a row meets: all dense ones and K experts a layer, whatever is shared or budgeted."""
    return 2 * num_rows * (shape.dense_weights + shape.num_moe_layers * shape.top_k * shape.expert_weights)


def floor_s(num_bytes: float, bytes_per_s: float) -> float:
    """Seconds in which these bytes can be read at the earliest."""
    if bytes_per_s <= 0:
        raise ValueError(f"bytes_per_s={bytes_per_s} is not allowed: give a measured bandwidth above 0.")
    return num_bytes / bytes_per_s


def break_even_tokens(step_s: float, plain_step_s: float, draft_s: float = 0.0) -> float:
    """a*: the tokens per step, bonus token included, above which speculation beats plain decoding.

    (t(step) + t(draft)) / t(plain step). All three measured, or all three modelled.
    """
    if plain_step_s <= 0:
        raise ValueError(f"plain_step_s={plain_step_s} is not allowed: a step of plain decoding takes time.")
    if min(step_s, draft_s) < 0:
        raise ValueError(f"step_s={step_s}, draft_s={draft_s} is not allowed: no time is below 0.")
    return (step_s + draft_s) / plain_step_s


@dataclass(frozen=True)
class StaticTree:
    """A draft tree whose shape is fixed beforehand: rows with the root, levels below it, children of a node at most."""

    num_rows: int
    depth: int
    top_k: int
    num_accepted: float


def likeliest_tree(acceptance: Sequence[Sequence[float]], num_rows: int) -> StaticTree:
    """The tree of at most `num_rows` rows that has most draft tokens accepted, where acceptance depends on place alone.

    acceptance[d][r]: the probability that the target's token below an accepted node of depth d is the drafter's choice
    of rank r (0 is the first). A node is accepted with the product p along its path, a tree has the sum of its nodes' p
    accepted, and no node is likelier than its parent or a better-ranked sibling: the best tree is that of the likeliest
    nodes. ValueError for what are no such probabilities.
    """
    for depth, ranks in enumerate(acceptance):
        if any(not 0 <= p <= 1 for p in ranks) or sum(ranks) > 1 + 1e-9 or list(ranks) != sorted(ranks, reverse=True):
            raise ValueError(f"acceptance={[*ranks]} at depth {depth} is not allowed: use falling shares of at most 1.")
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows} is not allowed: use 1, the root, or more.")
    chosen: list[tuple[float, int, int]] = []  # p, depth of the parent, rank
    candidates = [(-1.0, -1, 0, 1.0)]  # minus p, depth of the parent, rank, p of the parent; the root first
    while candidates and len(chosen) < num_rows:
        minus_p, depth, rank, parent_p = heapq.heappop(candidates)
        chosen.append((-minus_p, depth, rank))
        for d, r, above_p in ((depth + 1, 0, -minus_p), (depth, rank + 1, parent_p)):
            if 0 <= d < len(acceptance) and r < len(acceptance[d]) and acceptance[d][r] > 0:
                heapq.heappush(candidates, (-above_p * acceptance[d][r], d, r, above_p))
    nodes = chosen[1:]
    return StaticTree(
        num_rows=len(chosen),
        depth=1 + max((depth for _, depth, _ in nodes), default=-1),
        top_k=1 + max((rank for _, _, rank in nodes), default=-1),
        num_accepted=sum(p for p, _, _ in nodes),
    )


def gated_shape(
    name: str,
    num_layers: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    expert_ffn_size: int,
    attention_params: int,
    vocabulary_size: int,
    expert_weight_bytes: float,
) -> ModelShape:
    """A model by its sizes alone. What is of attention and of experts is one layer's; every layer has both.

    Experts of three matrices (gate, up, down), the rest in bf16. Norms and biases, below 0.2 %, are left out.
    """
    dense_weights = num_layers * (attention_params + num_experts * hidden_size) + vocabulary_size * hidden_size
    expert_weights = 3 * hidden_size * expert_ffn_size
    return ModelShape(
        name=name,
        num_moe_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        expert_ffn_size=expert_ffn_size,
        dense_bytes=BF16_BYTES * dense_weights,
        expert_bytes=round(expert_weights * expert_weight_bytes),
        dense_weights=dense_weights,
        expert_weights=expert_weights,
    )


# The models whose floors the project quotes: L, E, K, D, F, attention parameters per layer (q and o + k and v; all
# four are alike in OLMoE), V, bytes per expert weight.
WORKED_SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        gated_shape("OLMoE-1B-7B", 16, 64, 8, 2048, 1024, 4 * 2048 * 2048, 50_304, 2),
        gated_shape("Qwen3-30B-A3B", 48, 128, 8, 2048, 768, 2 * 2048 * 4096 + 2 * 2048 * 512, 151_936, 2),
        gated_shape("Mixtral-8x7B", 32, 8, 2, 4096, 14_336, 2 * 4096 * 4096 + 2 * 4096 * 1024, 32_000, 2),
        gated_shape("gpt-oss-20b", 24, 32, 4, 2880, 2880, 2 * 2880 * 4096 + 2 * 2880 * 512, 201_088, MXFP4_BYTES),
    )
}
