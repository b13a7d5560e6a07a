"""Governors of tree and budget: the interface, EVICT, Cascade, and our own.

Owns the names they go by on the command line and in benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable

from moespec.cost_table import CostTable
from moespec.governors.base import Governor, Outcome
from moespec.governors.cascade import CascadeLike
from moespec.governors.evict import Evict
from moespec.governors.utility import Utility

SPELLINGS = "fixed, evict, cascade-like, utility or utility:floor=P"


def parse_governor(text: str, costs: Callable[[], CostTable]) -> Governor | None:
    """The governor of a name; None is fixed settings. `costs` is asked where the governor needs what steps cost here.

    ValueError names what is no governor.
    """
    name, _, setting = text.partition(":")
    if text == "fixed":
        return None
    if text == "cascade-like":
        return CascadeLike()
    if text == "evict":
        return Evict(costs())
    key, _, number = setting.partition("=")
    if name == "utility" and (not setting or key == "floor"):
        try:
            floor = float(number) if setting else None
        except ValueError as error:
            raise ValueError(f"governor={text!r} cannot be run: floor={number!r} is not a number.") from error
        return Utility(costs(), floor)
    raise ValueError(f"governor={text!r} is not known: use {SPELLINGS}.")


__all__ = ["CascadeLike", "Evict", "Governor", "Outcome", "Utility", "parse_governor"]
