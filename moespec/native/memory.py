"""Arrays at addresses: what a kernel reads whose number of arrays is not known when it is compiled.

Nothing is checked, and an address keeps nothing alive: callers hold the memory for as long as the call lasts.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.intp), generate


@njit(inline="always", cache=True)
def floats_at(address, shape):
    """The fp32 array in C order that begins there."""
    return carray(_pointer(address), shape)
