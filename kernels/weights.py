"""The experts of one MoE layer as the kernels read them: layouts, number formats, activation. Owns no kernel.

Letters, here and in every file beside: T rows, D hidden size, F width of an expert, E experts, K top-k, N output and C
input features of a projection.

| format       | values                    | scale                                                            |
|--------------|---------------------------|------------------------------------------------------------------|
| float        | bf16, fp16, fp32 [E, N, C]| none                                                             |
| int8, fp8    | int8, e4m3 [E, N, C]      | fp32 [E, N / rows, C / columns], one for each block of the matrix |
| int4         | uint8 [E, N, C / 2]       | fp32 [E, N, C / 128]; byte j of a group holds columns j, j + 64   |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import FLOATS, MIN_DEPTH

INT4_GROUP = 128
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class ExpertMatrix:
    """One projection of all experts, y_n = sum_c x_c w[e, n, c] + bias[e, n].

    values  [E, N, C], or [E, N, C / 2] for int4, of any strides: a transposed layout is a transposed view
    scale   fp32 [E, ceil(N / rows), ceil(C / columns)], None for floats; block: (rows, columns) that share one
    bias    [E, N] or None
    """

    values: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (0, 0)
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        values, known = self.values, (*FLOATS, *_LARGEST, torch.uint8)
        if values.dim() != 3 or 1 not in values.stride()[1:]:
            raise ValueError(f"weights of strides {values.stride()} are not [E, N, C] with one stride of 1.")
        if values.dtype not in known:
            raise ValueError(f"weights of {values.dtype} are not one of {', '.join(map(str, known))}.")
        if values.dtype in FLOATS and (self.scale is not None or self.block != (0, 0)):
            raise ValueError(f"weights of {values.dtype} take no scale and no block.")
        if values.dtype not in FLOATS:
            self._check_scale()
        if self.bias is not None and (self.bias.shape != values.shape[:2] or self.bias.stride(1) != 1):
            raise ValueError(f"bias {tuple(self.bias.shape)} is not {tuple(values.shape[:2])}, [E, N] in one piece.")

    def _check_scale(self) -> None:
        """A loop over the columns loads one scale a turn: blocks that turns of a power of two can fill."""
        dtype, (rows, columns) = self.values.dtype, self.block
        if self.scale is None or rows < 1 or columns < 1:
            raise ValueError(f"weights of {dtype} need a scale, and the block (rows, columns) that shares one.")
        if self.is_int4 and (columns != INT4_GROUP or self.num_inputs % INT4_GROUP):
            raise ValueError(
                f"block={self.block} of int4 weights is not one of {INT4_GROUP} columns, all of them full."
            )
        if columns < self.num_inputs and columns % MIN_DEPTH:
            raise ValueError(f"block={self.block} has columns that are no multiple of {MIN_DEPTH}, nor all columns.")
        if self.scale.shape != self._scale_shape() or self.scale.dtype != torch.float32:
            found = f"{tuple(self.scale.shape)} of {self.scale.dtype}"
            raise ValueError(f"scales {found} are not {self._scale_shape()} of float32, one for each block.")

    @property
    def is_int4(self) -> bool:
        return self.values.dtype == torch.uint8

    @property
    def num_inputs(self) -> int:
        return self.values.shape[2] * (2 if self.is_int4 else 1)

    def of_expert(self, expert: int) -> ExpertMatrix:
        """This expert's alone, a view."""
        values, scale, bias = (
            None if part is None else part[expert : expert + 1] for part in (self.values, self.scale, self.bias)
        )
        assert values is not None, "every matrix has values"
        return ExpertMatrix(values, scale, self.block, bias)

    @property
    def bytes_per_expert(self) -> int:
        """What reading one expert's projection takes."""
        parts = (part for part in (self.values, self.scale, self.bias) if part is not None)
        return sum(part[0].numel() * part.element_size() for part in parts)

    def _scale_shape(self) -> tuple[int, int, int]:
        (num_experts, num_outputs, _), (rows, columns) = self.values.shape, self.block
        return num_experts, math.ceil(num_outputs / rows), math.ceil(self.num_inputs / columns)


@dataclass(frozen=True)
class Gate:
    """gate * sigmoid(alpha * gate) * (up + shift): gate cut off above, up on both sides, at `limit`. SiLU as it is."""

    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0

    @property
    def numbers(self) -> tuple[float, float, float]:
        """As kernels take it."""
        return self.alpha, self.limit, self.shift

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up.clamp(-self.limit, self.limit) + self.shift)


@dataclass(frozen=True)
class ExpertWeights:
    """gate_up [E, 2 F, D]: all gates, then all ups, or in turns where `interleaved`; down [E, D, F]."""

    gate_up: ExpertMatrix
    down: ExpertMatrix
    gate: Gate = Gate()
    interleaved: bool = False

    def __post_init__(self) -> None:
        expected = self.num_experts, 2 * self.width, self.hidden_size
        if (*self.gate_up.values.shape[:2], self.gate_up.num_inputs) != expected:
            raise ValueError(
                f"gate_up {tuple(self.gate_up.values.shape)} and down {tuple(self.down.values.shape)} do not belong "
                "together: use [E, 2 F, D] and [E, D, F]."
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a kernel reads, by name."""
        return {
            f"{name} {part}": tensor
            for name, matrix in (("gate_up", self.gate_up), ("down", self.down))
            for part, tensor in (("values", matrix.values), ("scale", matrix.scale), ("bias", matrix.bias))
            if tensor is not None
        }

    @property
    def num_experts(self) -> int:
        return self.down.values.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.values.shape[1]

    @property
    def width(self) -> int:
        return self.down.num_inputs

    @property
    def bytes_per_expert(self) -> int:
        return self.gate_up.bytes_per_expert + self.down.bytes_per_expert


def quantize(values_ENC: Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None) -> ExpertMatrix:
    """int8 or fp8 (e4m3), nearest, symmetric; `block` (rows, columns) shares a scale, None: each output row has one.

    Columns come to lie side by side, whatever the layout was: bytes side by side are what wide loads are made of.
    """
    if dtype not in _LARGEST:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(map(str, _LARGEST))}.")
    _, num_rows, num_columns = values_ENC.shape
    rows, columns = block or (1, num_columns)
    down, right = math.ceil(num_rows / rows), math.ceil(num_columns / columns)
    padding = (0, right * columns - num_columns, 0, down * rows - num_rows)
    padded = torch.nn.functional.pad(values_ENC.float(), padding)
    blocks = padded.unflatten(1, (down, rows)).unflatten(3, (right, columns))
    scale = _scale(blocks.abs().amax(dim=(2, 4)), _LARGEST[dtype])
    scaled = values_ENC.float() / _expanded(scale, (rows, columns), values_ENC.shape)
    values = (scaled.round() if dtype == torch.int8 else scaled).to(dtype).contiguous()
    return ExpertMatrix(values, scale.contiguous(), (rows, columns))


def quantize_int4(values_ENC: Tensor) -> ExpertMatrix:
    """Symmetric int4 in groups of 128 columns: nearest, -7 to 7."""
    num_columns = values_ENC.shape[2]
    if num_columns % INT4_GROUP:
        raise ValueError(f"weights of {num_columns} columns are not in groups of {INT4_GROUP}: int4 has no others.")
    groups_ENGc = values_ENC.float().unflatten(2, (-1, INT4_GROUP))
    scale_ENG = _scale(groups_ENGc.abs().amax(dim=3), 7)
    codes = (groups_ENGc / scale_ENG[..., None]).round().clamp(-8, 7).to(torch.int16) + 8
    low, high = codes.chunk(2, dim=3)
    return ExpertMatrix((low | (high << 4)).to(torch.uint8).contiguous().flatten(2), scale_ENG, (1, INT4_GROUP))


def dequantized(matrix: ExpertMatrix, dtype: torch.dtype) -> Tensor:
    """The weights [E, N, C] that a kernel multiplies by."""
    if matrix.scale is None:
        return matrix.values.to(dtype)
    values = matrix.values
    if matrix.is_int4:
        bytes_ENGj = values.unflatten(2, (-1, INT4_GROUP // 2))
        values = torch.cat([bytes_ENGj & 15, bytes_ENGj >> 4], dim=3).flatten(2).to(torch.int16) - 8
    return values.to(dtype) * _expanded(matrix.scale, matrix.block, values.shape).to(dtype)


def _scale(most: Tensor, largest: float) -> Tensor:
    """What brings `most` to `largest`; never so small that a division by it overflows or it is flushed to zero."""
    return (most / largest).clamp(min=torch.finfo(torch.float32).tiny)


def _expanded(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each entry."""
    rows, columns = block
    return scale.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)[:, : shape[1], : shape[2]]
