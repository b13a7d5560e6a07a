"""What a verify step must read, how long that takes at the least, and when speculation pays. Pure Python, no torch.

Owns the limit formulae: every figure from here is modelled, a floor and not a measurement. Knows nothing of machines
(bandwidth comes in as an argument), of loaded models or of how many experts a router really uses.

Letters: L MoE layers, E experts, K top-k, D hidden size, F expert FFN size, V vocabulary, T rows of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BF16_BYTES = 2  # per weight
MXFP4_BYTES = 4.25 / 8  # per weight: 4 bits, and an 8-bit scale for every 32 weights


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a model's step depends on.

    dense_bytes   all that every step reads whatever the routing: attention, routers, lm_head
    expert_bytes  one expert of one layer, all its matrices
    """

    name: str
    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_ffn_size: int
    dense_bytes: int
    expert_bytes: int

    def __post_init__(self) -> None:
        assert 1 <= self.top_k <= self.num_experts


def expected_union(num_experts: int, top_k: int, num_rows: int) -> float:
    """U(T) = E (1 - (1 - K/E)^T): the experts that T rows use together where routing is uniform and independent.

    An upper bound for a real router: experts that are preferred, or that neighbouring rows share, make the union
    smaller. (Rows that avoided one another's experts would exceed it.)
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} is not allowed: use 1 to {num_experts}, the number of experts.")
    if num_rows < 0:
        raise ValueError(f"num_rows={num_rows} is not allowed: use 0 or more.")
    return num_experts * (1 - (1 - top_k / num_experts) ** num_rows)


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


def _gated_shape(
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
    """Experts of three matrices (gate, up, down), the rest in bf16. Norms and biases, below 0.2 %, are left out."""
    layer_params = attention_params + num_experts * hidden_size
    return ModelShape(
        name=name,
        num_moe_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        expert_ffn_size=expert_ffn_size,
        dense_bytes=BF16_BYTES * (num_layers * layer_params + vocabulary_size * hidden_size),
        expert_bytes=round(3 * hidden_size * expert_ffn_size * expert_weight_bytes),
    )


# The models whose floors the project quotes: L, E, K, D, F, attention parameters per layer (q and o + k and v; all
# four are alike in OLMoE), V, bytes per expert weight.
WORKED_SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _gated_shape("OLMoE-1B-7B", 16, 64, 8, 2048, 1024, 4 * 2048 * 2048, 50_304, 2),
        _gated_shape("Qwen3-30B-A3B", 48, 128, 8, 2048, 768, 2 * 2048 * 4096 + 2 * 2048 * 512, 151_936, 2),
        _gated_shape("Mixtral-8x7B", 32, 8, 2, 4096, 14_336, 2 * 4096 * 4096 + 2 * 4096 * 1024, 32_000, 2),
        _gated_shape("gpt-oss-20b", 24, 32, 4, 2880, 2880, 2 * 2880 * 4096 + 2 * 2880 * 512, 201_088, MXFP4_BYTES),
    )
}
