"""MoE layers of published models, as the kernels see them: for compiling ahead of time, for tests and benchmarks.

Owns their sizes and layouts. Knows nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.select import Rule
from kernels.weights import INT4_GROUP, ExpertMatrix, ExpertWeights, Gate, quantize, quantize_int4

SILU = Gate()
FORMATS: dict[str, Callable[[Tensor], ExpertMatrix]] = {
    "bf16": ExpertMatrix,
    "int8": lambda values_ENC: quantize(values_ENC, torch.int8),
    "fp8": lambda values_ENC: quantize(values_ENC, torch.float8_e4m3fn),
    "fp8 128x128": lambda values_ENC: quantize(values_ENC, torch.float8_e4m3fn, (128, 128)),
    "int4": quantize_int4,
}


@dataclass(frozen=True)
class Layer:
    """`is_transposed`: input features lie outermost, [E, C, N] in memory, and gates and ups take turns."""

    hidden_size: int
    width: int
    num_experts: int
    top_k: int
    rule: Rule = Rule.RENORMALISED
    is_transposed: bool = False
    has_bias: bool = False
    gate: Gate = SILU

    def random_weights(self, number_format: str, device: torch.device, seed: int | None = 0) -> ExpertWeights:
        """Experts drawn in bf16, then quantized; inputs of unit variance keep about that."""
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)

        def matrix(num_outputs: int, num_inputs: int) -> ExpertMatrix:
            shape = (self.num_experts, num_outputs, num_inputs)
            values_ENC = torch.empty(shape, dtype=torch.bfloat16, device=device)
            if self.is_transposed:
                values_ENC = torch.empty_like(values_ENC.mT, memory_format=torch.contiguous_format).mT
            values_ENC.normal_(std=num_inputs**-0.5, generator=generator)
            bias_EN = torch.empty(shape[:2], dtype=torch.bfloat16, device=device).normal_(generator=generator)
            return replace(FORMATS[number_format](values_ENC), bias=bias_EN if self.has_bias else None)

        gate_up, down = matrix(2 * self.width, self.hidden_size), matrix(self.hidden_size, self.width)
        return ExpertWeights(gate_up, down, self.gate, interleaved=self.is_transposed)

    def has_format(self, number_format: str) -> bool:
        """int4 wants whole groups."""
        return number_format != "int4" or self.hidden_size % INT4_GROUP == self.width % INT4_GROUP == 0


LAYERS = {
    "OLMoE-1B-7B": Layer(2048, 1024, 64, 8, Rule.SOFTMAX),
    "Qwen3-30B-A3B": Layer(2048, 768, 128, 8),
    "Mixtral-8x7B": Layer(4096, 14336, 8, 2),
    "gpt-oss-20b": Layer(2880, 2880, 32, 4, Rule.SOFTMAX_OF_CHOSEN, True, True, Gate(1.702, 7.0, 1.0)),
}
