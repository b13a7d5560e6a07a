"""Tiles of matrix products in explicit vectors: the compiler, left alone, reaches a half to a third of their speed.

| tile     | writes                                                                | from                      |
|----------|-----------------------------------------------------------------------|---------------------------|
| `dots_R` | y[row : row + R, (o, o + apart)] = (x weight^T) there                 | x [T, D], weight [O, D]   |
| `mix_R`  | y[row : row + R, o : o + 16] = (x weight) there                       | x [T, S], weight [S, O]   |

Sums stay in registers. x and y are fp32 in C order; a weight may be bf16, as its bits in uint16; D is a multiple of
`DEPTH`. Nothing is checked: callers stay inside the arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
NUM_SUMS = 8  # vectors that are summed into at a time: as many as hide the latency of an addition
DEPTH = 32  # values of D that one round of `dots_1` takes, the most of all
FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)

# Three rounds add the lanes of eight vectors into one: of each pair, halves side by side, added.
FOLDS = (
    ((0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    ((0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
)


class _Matrix:
    """An array argument of a tile: the addresses of its rows, and what is read or written there."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value) -> None:
        array = context.make_array(kind)(context, builder, value)
        self._builder, self._size = builder, 2 if kind.dtype == types.uint16 else 4
        self.num_rows, self.num_columns = cgutils.unpack_tuple(builder, array.shape)
        self._stride = cgutils.unpack_tuple(builder, array.strides)[0]
        self._base = builder.ptrtoint(array.data, self._stride.type)

    def row(self, index: ir.Value, plus: int = 0) -> ir.Value:
        b = self._builder
        return b.add(self._base, b.mul(b.add(index, index.type(plus)), self._stride))

    def vector(self, row: ir.Value, column: ir.Value, plus: int = 0) -> ir.Value:
        """Eight values in fp32."""
        b = self._builder
        if self._size == 4:
            return b.load(self._at(row, column, plus, FLOATS), align=4)
        bits = b.zext(b.load(self._at(row, column, plus, SHORTS), align=2), INTS)
        return b.bitcast(b.shl(bits, ir.Constant(INTS, [16] * LANES)), FLOATS)

    def everywhere(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """One value in all lanes."""
        b = self._builder
        value = b.load(self._at(row, column, 0, ir.FloatType()), align=4)
        first = b.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.IntType(32)(0))
        return b.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))

    def put(self, value: ir.Value, row: ir.Value, column: ir.Value, plus: int = 0) -> None:
        self._builder.store(value, self._at(row, column, plus, value.type), align=4)

    def _at(self, row: ir.Value, column: ir.Value, plus: int, kind: ir.Type) -> ir.Value:
        b = self._builder
        offset = b.mul(b.add(column, column.type(plus)), column.type(self._size))
        return b.inttoptr(b.add(row, offset), kind.as_pointer())


class _Sums:
    """Vectors of sums, 0 at first, that the compiler keeps in registers."""

    def __init__(self, builder: ir.IRBuilder, count: int) -> None:
        self._builder = builder
        self._places = [cgutils.alloca_once(builder, FLOATS) for _ in range(count)]
        for place in self._places:
            builder.store(ir.Constant(FLOATS, [0.0] * LANES), place)

    def add(self, number: int, a: ir.Value, b: ir.Value) -> None:
        place = self._places[number]
        product = self._builder.fmul(a, b, flags=("fast",))
        self._builder.store(self._builder.fadd(product, self._builder.load(place), flags=("fast",)), place)

    def vectors(self) -> list[ir.Value]:
        return [self._builder.load(place) for place in self._places]

    def folded(self, num_parts: int) -> ir.Value:
        """The sums of all lanes of each `num_parts` vectors in turn, in the first lanes of one vector."""
        b, vectors = self._builder, self.vectors()
        while num_parts > 1:
            vectors = [b.fadd(*pair, flags=("fast",)) for pair in _pairs(vectors)]
            num_parts //= 2
        vectors *= LANES // len(vectors)
        for masks in FOLDS:
            halves = [[b.shuffle_vector(*pair, ir.Constant(INTS, mask)) for mask in masks] for pair in _pairs(vectors)]
            vectors = [b.fadd(*half, flags=("fast",)) for half in halves]
        return vectors[0]


def _pairs(vectors: list[ir.Value]) -> list[tuple[ir.Value, ir.Value]]:
    return list(zip(vectors[::2], vectors[1::2], strict=True))


def _tile(emit: Callable[..., None]) -> Any:
    """A tile (x, row, weight, y, *columns), whose code `emit(builder, x, row, weight, y, *columns)` writes."""

    def typed(typing_context: Any, x: Any, row: Any, weight: Any, y: Any, columns: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            matrix = [_Matrix(context, builder, kind, values[n]) for n, kind in ((0, x), (2, weight), (3, y))]
            emit(builder, matrix[0], values[1], *matrix[1:], *cgutils.unpack_tuple(builder, values[4]))
            return context.get_dummy_value()

        return types.void(x, types.intp, weight, y, types.UniTuple(types.intp, len(columns))), generate

    return intrinsic(typed)


def _dots(num_rows: int) -> Any:
    """The tile of x weight^T over two rows of weights; where rows are few, a sum is kept in several parts."""
    num_parts = NUM_SUMS // (2 * num_rows)

    def emit(
        b: ir.IRBuilder, x: _Matrix, row: ir.Value, weight: _Matrix, y: _Matrix, o: ir.Value, apart: ir.Value
    ) -> None:
        columns = o, b.add(o, apart)
        rows, weights = [x.row(row, n) for n in range(num_rows)], [weight.row(column) for column in columns]
        sums = _Sums(b, NUM_SUMS)
        zero = x.num_columns.type(0)
        with cgutils.for_range_slice(b, zero, x.num_columns, zero.type(LANES * num_parts)) as (i, _):
            for part in range(num_parts):
                pair = [weight.vector(place, i, LANES * part) for place in weights]
                for n, place in enumerate(rows):
                    values = x.vector(place, i, LANES * part)
                    for m in range(2):
                        sums.add((2 * n + m) * num_parts + part, pair[m], values)
        total = sums.folded(num_parts)
        for n in range(num_rows):
            for m in range(2):
                y.put(b.extract_element(total, ir.IntType(32)(2 * n + m)), y.row(row, n), columns[m])

    return _tile(emit)


def _mix(num_rows: int) -> Any:
    """The tile of x weight, two vectors wide."""

    def emit(b: ir.IRBuilder, x: _Matrix, row: ir.Value, weight: _Matrix, y: _Matrix, o: ir.Value) -> None:
        rows = [x.row(row, n) for n in range(num_rows)]
        sums = _Sums(b, 2 * num_rows)
        zero = weight.num_rows.type(0)
        with cgutils.for_range_slice(b, zero, weight.num_rows, zero.type(1)) as (s, _):
            place = weight.row(s)
            pair = weight.vector(place, o), weight.vector(place, o, LANES)
            for n, start in enumerate(rows):
                value = x.everywhere(start, s)
                for m in range(2):
                    sums.add(2 * n + m, pair[m], value)
        for number, vector in enumerate(sums.vectors()):
            y.put(vector, y.row(row, number // 2), o, LANES * (number % 2))

    return _tile(emit)


dots_4, dots_3, dots_2, dots_1 = _dots(4), _dots(3), _dots(2), _dots(1)
mix_4, mix_3, mix_2, mix_1 = _mix(4), _mix(3), _mix(2), _mix(1)
