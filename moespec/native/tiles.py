"""Tiles of matrix products in explicit vectors: the compiler, left alone, reaches a half to a third of their speed.

| tile     | writes                                                                | from                      |
|----------|-----------------------------------------------------------------------|---------------------------|
| `dots_R` | y[row : row + R, (o, o + apart)] = (x weight^T) there                 | x [T, D], weight [O, D]   |
| `mix_R`  | y[row : row + R, o : o + 16] = x weight[:, i : i + 16]                | x [T, S], weight [S, O]   |

Sums stay in registers. x and y are fp32 in C order; a weight may be int8; D is a multiple of `DEPTH`. Nothing is
checked: callers stay inside the arrays.
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
BYTES = ir.VectorType(ir.IntType(8), LANES)
PREFETCH_BYTES = 8192  # how far ahead of its turn a weight is asked for, where products take longer than reading

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
        assert kind.dtype in (types.float32, types.int8), f"tiles read fp32 and int8, not {kind.dtype}"
        self._builder, self._size = builder, kind.dtype.bitwidth // 8
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
        return b.sitofp(b.load(self._at(row, column, plus, BYTES), align=1), FLOATS)

    def broadcast(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """One value in all lanes."""
        b = self._builder
        value = b.load(self._at(row, column, 0, ir.FloatType()), align=4)
        first = b.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.IntType(32)(0))
        return b.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))

    def prefetch(self, row: ir.Value, column: ir.Value) -> None:
        """Begin to read what lies `PREFETCH_BYTES` ahead of here. An address outside the array does no harm."""
        b, number = self._builder, ir.IntType(32)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
        place = self._at(b.add(row, row.type(PREFETCH_BYTES)), column, 0, ir.IntType(8))
        b.call(function, [place, *map(number, (0, 3, 1))])  # to read, to keep near, data

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

    def totals(self, num_parts: int) -> list[ir.Value]:
        """The sum of each `num_parts` vectors in turn."""
        vectors = [self._builder.load(place) for place in self._places]
        while num_parts > 1:
            vectors = [self._builder.fadd(*pair, flags=("fast",)) for pair in _pairs(vectors)]
            num_parts //= 2
        return vectors

    def folded(self, num_parts: int) -> ir.Value:
        """The sums of all lanes of each `num_parts` vectors in turn, in the first lanes of one vector."""
        b, vectors = self._builder, self.totals(num_parts)
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


def _mix(num_rows: int, num_parts: int) -> Any:
    """The tile of x weight, two vectors wide; where rows are few, a sum is kept in several parts.

    One row is done as soon as its weights are there: asking for more than the processor does by itself takes time.
    """

    def emit(b: ir.IRBuilder, x: _Matrix, row: ir.Value, weight: _Matrix, y: _Matrix, i: ir.Value, o: ir.Value) -> None:
        rows = [x.row(row, n) for n in range(num_rows)]
        sums = _Sums(b, 2 * num_rows * num_parts)
        zero = weight.num_rows.type(0)

        def add(s: ir.Value, part: int) -> None:
            place = weight.row(s, part)
            if num_rows > 1:
                weight.prefetch(place, i)
            pair = weight.vector(place, i), weight.vector(place, i, LANES)
            for n, start in enumerate(rows):
                value = x.broadcast(start, b.add(s, s.type(part)))
                for m in range(2):
                    sums.add((2 * n + m) * num_parts + part, pair[m], value)

        whole = b.sub(weight.num_rows, b.urem(weight.num_rows, zero.type(num_parts)))
        with cgutils.for_range_slice(b, zero, whole, zero.type(num_parts)) as (s, _):
            for part in range(num_parts):
                add(s, part)
        if num_parts > 1:
            with cgutils.for_range_slice(b, whole, weight.num_rows, zero.type(1)) as (s, _):
                add(s, 0)
        for number, vector in enumerate(sums.totals(num_parts)):
            y.put(vector, y.row(row, number // 2), o, LANES * (number % 2))

    return _tile(emit)


dots_4, dots_3, dots_2, dots_1 = _dots(4), _dots(3), _dots(2), _dots(1)
mix_4, mix_3, mix_2, mix_1 = _mix(4, 1), _mix(3, 2), _mix(2, 2), _mix(1, 4)
