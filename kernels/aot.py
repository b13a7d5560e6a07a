"""Every kernel compiled ahead of time, without a GPU: registers, spills, shared memory, how wide the weights are read.

    python -m kernels.aot --json assets/bench/kernels-aot.json

The library's own launches run on tensors without memory (torch's fake ones), before a driver that names a card of the
wanted capability: what is compiled here is what a launch there would compile, tiles included. Knows nothing of speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from kernels.checks import IS_INTERPRETED, MAX_EXPERTS
from kernels.down import down
from kernels.experts import tiles_for
from kernels.gate_up import gate_up
from kernels.keep_rows import keep_rows
from kernels.lists import group
from kernels.rotate import HeadNorms, rotate
from kernels.select import Settings, select
from kernels.shapes import FORMATS, LAYERS, Layer
from kernels.tiles import ROW_BUCKETS, Card
from kernels.weights import ExpertMatrix

CARDS = {
    80: Card("NVIDIA A100-SXM4-80GB", 108, 166_912),
    90: Card("NVIDIA H100 80GB HBM3", 132, 232_448),
    120: Card("NVIDIA RTX PRO 6000 Blackwell Server Edition", 188, 101_376),
}
MOST_EXPERTS = "most experts"  # routing at the kernels' limit
_ROUTED = {**LAYERS, MOST_EXPERTS: Layer(2048, 512, MAX_EXPERTS, 8)}
_DEVICE = torch.device("cuda")
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ROW = "{:7}{:14} {:11} {:>4} {:11} {:>8} {:>5} {:>7} {:>7} {:>5} {}"
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)")
_LOAD_ONCE = re.compile(r"ld\.global\S*evict_first\S*?(?:\.v(\d))?\.b(\d+) ")  # only weights are wanted once
_PRODUCT = re.compile(r"(wgmma|mma)\.\S*?(m\d+n\d+k\d+)\S*?\.(bf16|f16|tf32)\.")


@dataclass(frozen=True)
class Compiled:
    """What the compiler and the assembler say of one kernel; sizes in bytes.

    tile            columns and depth; None: it reads no weights, and is the same for every format ("")
    narrowest_load  of weights, or of x beside them
    products        instructions of the matrix unit, with their shape and type
    """

    capability: int
    layer: str
    format: str
    rows: int
    kernel: str
    tile: tuple[int, int] | None
    num_warps: int
    num_stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    narrowest_load: int
    products: str


class _Driver:
    """A card of one capability, as far as compiling asks."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # kernels are kept by device: no other than this card's are met

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Launches inside compile for this capability and end there; the list receives what they compiled."""
    launches: list[Any] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        mocked = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, Tensor) else a for a in arguments]
        launches.append(run(kernel, *mocked, grid=grid, warmup=True, **named))

    card = mock.patch.object(triton.runtime.driver, "_active", _Driver(capability))
    with card, mock.patch.object(JITFunction, "run", compile_only), FakeTensorMode():
        yield launches


def launch_experts(layer: Layer, number_format: str, num_rows: int, card: Card) -> None:
    """The launches of a layer's experts for this many rows."""
    x_TD = torch.empty(num_rows, layer.hidden_size, dtype=torch.bfloat16, device=_DEVICE)
    ids_TK, weights_TK = _plan(layer, num_rows)
    weights = layer.random_weights(number_format, torch.device("cpu"), seed=None)
    weights = replace(weights, gate_up=_on_card(weights.gate_up), down=_on_card(weights.down))
    tiles = tiles_for(x_TD, layer.top_k, weights, card)
    lists = group(ids_TK, weights_TK, layer.num_experts)
    down(gate_up(x_TD, lists, weights, tiles[0]), lists, weights, tiles[1])


def launch_routing(layer: Layer, num_rows: int) -> None:
    """The launches beside the experts: of the method, of lists of another's plan, of attention, of a step's end."""
    logits_TE = torch.empty(num_rows, layer.num_experts, dtype=torch.bfloat16, device=_DEVICE)
    row_weights_T = torch.empty(num_rows, dtype=torch.float32, device=_DEVICE)
    settings = Settings.on(_DEVICE, num_rows, layer.top_k)
    select(logits_TE, row_weights_T, settings, layer.top_k, layer.rule, torch.bfloat16)
    group(*_plan(layer, num_rows), layer.num_experts)
    cache = torch.empty(1, 4, 2048, 128, dtype=torch.bfloat16, device=_DEVICE)
    projections, turn, *weights = (
        torch.empty(*shape, dtype=torch.bfloat16, device=_DEVICE)
        for shape in ((num_rows, 40 * 128), (num_rows, 128), (128,), (32 * 128,), (4 * 128,))
    )
    of_head, of_queries, of_keys = weights
    rows_T, keys = torch.empty(num_rows, dtype=torch.int64, device=_DEVICE), cache.view(4, 2048, 128)
    for norms in (None, HeadNorms(of_head, of_head, 1e-6), HeadNorms(of_queries, of_keys, 1e-6)):
        rotate(projections, (turn, turn), norms, rows_T, keys, keys)
    keep_rows(torch.empty(2, dtype=torch.int64, device=_DEVICE), cache, 1000, range(num_rows))


def _plan(layer: Layer, num_rows: int) -> tuple[Tensor, Tensor]:
    shape = (num_rows, layer.top_k)
    ids_TK = torch.empty(shape, dtype=torch.int64, device=_DEVICE)
    return ids_TK, torch.empty(shape, dtype=torch.bfloat16, device=_DEVICE)


def _on_card(matrix: ExpertMatrix) -> ExpertMatrix:
    found = {"values": matrix.values, "scale": matrix.scale, "bias": matrix.bias}
    moved: dict[str, Any] = {
        name: torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=_DEVICE)
        for name, part in found.items()
        if part is not None
    }
    return replace(matrix, **moved)


def inspect(compiled: Any, capability: int, layer: str, number_format: str, num_rows: int) -> Compiled:
    """Assembles the kernel once more, with the assembler of Triton's wheel, which then says what it used."""
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None, "PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        flags = "-v", f"--gpu-name={target[1]}", "-o", str(Path(folder, "kernel.cubin"))
        said = subprocess.run(
            [_assembler(capability), *flags, source], capture_output=True, text=True, check=True
        ).stderr
    spills, registers = _SPILLS.search(said), _REGISTERS.search(said)
    assert spills is not None and registers is not None, said
    names = compiled.src.fn.arg_names
    tile = {names[place[0]]: value for place, value in compiled.src.constants.items()}.get("TILE")
    widths = [int(width, 0) for width in _COPY.findall(ptx)]
    widths += [int(count or 1) * int(bits) // 8 for count, bits in _LOAD_ONCE.findall(ptx)]
    return Compiled(
        *(capability, layer, number_format if tile else "", num_rows, metadata.name.removesuffix("_kernel"), tile),
        *(metadata.num_warps, metadata.num_stages, int(registers[1]), int(spills[1]), int(spills[2]), metadata.shared),
        *(min(widths, default=0), ", ".join(sorted({" ".join(found) for found in _PRODUCT.findall(ptx)}))),
    )


def _assembler(capability: int) -> Path:
    return _BINARIES / ("ptxas-blackwell" if capability >= 100 else "ptxas")


def compile_all(
    capabilities: Sequence[int], layers: Sequence[str], formats: Sequence[str], buckets: Sequence[int]
) -> Iterator[Compiled]:
    """Every kernel of every case that the cards run, those that do not depend on the format once."""
    for capability, name, num_rows in [(c, n, b) for c in capabilities for n in layers for b in buckets]:
        print(f"Compiling for sm_{capability}: {name}, {num_rows} rows.", file=sys.stderr)
        layer, seen = _ROUTED[name], set()
        with compiling(capability) as launches:
            launch_routing(layer, num_rows)
        cases = [("", compiled) for compiled in launches]
        for number_format in formats if name in LAYERS else ():
            if layer.has_format(number_format) and not ("fp8" in number_format and capability < 89):
                with compiling(capability) as launches:
                    launch_experts(layer, number_format, num_rows, CARDS[capability])
                cases += [(number_format, compiled) for compiled in launches]
        for number_format, compiled in cases:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                yield inspect(compiled, capability, name, number_format, num_rows)


def write(path: Path, kernels: list[Compiled]) -> None:
    """One kernel a line."""
    versions = {
        f"sm_{capability}": subprocess.run([_assembler(capability), "--version"], capture_output=True, text=True)
        .stdout.splitlines()[-1]
        .strip()
        for capability in sorted({kernel.capability for kernel in kernels})
    }
    head = {"made_by": "python -m kernels.aot", "triton": triton.__version__, "assemblers": versions}
    head["columns"] = [field.name for field in fields(Compiled)]
    lines = ",\n".join(json.dumps(astuple(kernel)) for kernel in kernels)
    path.write_text(f'{json.dumps(head)[:-1]}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")


def read(path: Path) -> list[Compiled]:
    """What `write` wrote."""
    return [Compiled(*kernel) for kernel in json.loads(path.read_text(encoding="utf-8"))["kernels"]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel without a GPU; say what it takes of one.")
    parser.add_argument("--json", type=Path, help="a file to write the record to")
    parser.add_argument("--capabilities", nargs="+", type=int, choices=list(CARDS), default=list(CARDS))
    parser.add_argument("--layers", nargs="+", choices=list(_ROUTED), default=list(_ROUTED))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, choices=ROW_BUCKETS, default=list(ROW_BUCKETS))
    args = parser.parse_args(arguments)
    if IS_INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled. Unset it.")
    kernels = []
    print(
        _ROW.format(
            "card", "layer", "format", "rows", "kernel", "tile", "regs", "spilled", "shared", "load", "products"
        )
    )
    for kernel in compile_all(args.capabilities, args.layers, args.formats, args.rows):
        kernels.append(kernel)
        names = f"sm_{kernel.capability}", kernel.layer, kernel.format, kernel.rows, kernel.kernel
        tile = " x ".join(map(str, kernel.tile or ()))
        sizes = kernel.registers, kernel.spill_stores, kernel.shared_bytes, kernel.narrowest_load
        print(_ROW.format(*names, tile, *sizes, kernel.products), flush=True)
    if args.json is not None:
        write(args.json, kernels)
        print(f"Wrote {len(kernels)} kernels to {args.json}.", file=sys.stderr)


if __name__ == "__main__":
    main()
