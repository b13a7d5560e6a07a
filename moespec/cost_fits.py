"""How step times measured at some rows and experts are continued to others: least squares, and straight lines between.

Owns the ways to do it and the error by which one is chosen. Knows nothing of what is measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Curve = Sequence[tuple[float, float]]  # (x, y), x increasing
Predict = Callable[[float, float], float]  # (rows T, experts read n) to milliseconds


class Sample(NamedTuple):
    """A step of so many rows that reads so many experts per layer."""

    num_rows: float
    num_read: float
    ms: float


def fit_plane(samples: Sequence[Sample]) -> Predict:
    """a + b T + c n."""
    return _linear(samples, lambda num_rows, num_read: [1.0, num_rows, num_read])


def fit_twisted_plane(samples: Sequence[Sample]) -> Predict:
    """a + b T + c n + d T n: an expert costs more where more rows use it."""
    return _linear(samples, lambda num_rows, num_read: [1.0, num_rows, num_read, num_rows * num_read])


def fit_lines(samples: Sequence[Sample]) -> Predict:
    """A line a + c n for every measured number of rows, and between two of them what lies between."""
    by_rows: dict[float, list[Sample]] = {}
    for sample in samples:
        by_rows.setdefault(sample.num_rows, []).append(sample)
    lines = {rows: _linear(found, lambda _, num_read: [1.0, num_read]) for rows, found in sorted(by_rows.items())}
    return lambda num_rows, num_read: between([(rows, line(rows, num_read)) for rows, line in lines.items()], num_rows)


FITS: dict[str, Callable[[Sequence[Sample]], Predict]] = {
    "plane": fit_plane,
    "twisted plane": fit_twisted_plane,
    "lines by rows": fit_lines,
}


def held_out_errors(fit: Callable[[Sequence[Sample]], Predict], samples: Sequence[Sample]) -> list[float]:
    """|predicted / measured - 1| of each sample by a fit to all others; infinite where there are none."""
    if len(samples) == 1:
        return [float("inf")]
    errors = []
    for number, sample in enumerate(samples):
        predict = fit([*samples[:number], *samples[number + 1 :]])
        errors.append(abs(predict(sample.num_rows, sample.num_read) / sample.ms - 1))
    return errors


def least_squares(rows: Sequence[Any], values: Sequence[float]) -> np.ndarray:
    """Weights that make relative errors small: a step of 1 ms counts as much as one of 10."""
    scale = np.array(values)
    return np.linalg.lstsq(np.array(rows) / scale[:, None], np.ones(len(values)), rcond=None)[0]


def between(curve: Curve, x: float) -> float:
    """Piecewise linear; constant outside."""
    place = bisect_right(curve, x, key=lambda point: point[0])
    if place in (0, len(curve)):
        return curve[min(place, len(curve) - 1)][1]
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _linear(samples: Sequence[Sample], terms: Callable[[float, float], list[float]]) -> Predict:
    weights = least_squares([terms(s.num_rows, s.num_read) for s in samples], [s.ms for s in samples])
    return lambda num_rows, num_read: float(np.dot(terms(num_rows, num_read), weights))
