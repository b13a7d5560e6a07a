"""Plotly figures of a finished answer, for hovering and zooming, and what all figures of the page have in common.

Pure: traces in, a figure out; not for live use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moespec.trace import LayerTrace

INK, GRID = "#8a8f98", "rgba(138,143,152,0.25)"  # readable on a light and on a dark page
HOVER, HOVER_INK = "#1f2937", "#f3f4f6"  # else the trace's own colour, on which not all ink can be read
MASS_SCALE = "Viridis"  # perceptually uniform


def expert_figure(steps: Sequence[Sequence[LayerTrace]], num_experts: int) -> go.Figure:
    """Heat map of mean router mass by layer and expert, and each layer's tail: the mass beyond a step's n heaviest."""
    layers = [layer.layer for layer in steps[0]]
    mass_SLE = np.array([[layer.score for layer in step] for step in steps])
    mass_SLE /= mass_SLE.sum(axis=2, keepdims=True)
    mass_LE = mass_SLE.mean(axis=0)
    # Sorted step by step: a budget chooses anew in each, and the heaviest experts of one are not those of the next.
    beyond_LE = np.clip(1 - np.sort(mass_SLE, axis=2)[:, :, ::-1].cumsum(axis=2).mean(axis=0), 0, 1)
    natural_LE, active_LE = (_how_often(steps, name, num_experts) for name in ("natural", "active"))
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.1,
        subplot_titles=("Router mass by layer and expert", "Tails: mass beyond the n heaviest experts"),
    )
    figure.add_trace(
        go.Heatmap(
            z=mass_LE,
            y=[f"{layer}" for layer in layers],
            customdata=np.stack([natural_LE, active_LE], axis=-1),
            hovertemplate="layer %{y}, expert %{x}<br>%{z:.2%} of the router mass<br>"
            "asked for in %{customdata[0]:.0%} of the steps, read in %{customdata[1]:.0%}<extra></extra>",
            colorscale=MASS_SCALE,
            colorbar={"title": "share", "x": 0.56, "thickness": 10, "tickformat": ".0%"},
        ),
        row=1,
        col=1,
    )
    for number, beyond_E in zip(layers, beyond_LE, strict=True):
        figure.add_trace(
            go.Scatter(
                x=list(range(1, num_experts + 1)),
                y=beyond_E,
                name=f"layer {number}",
                hovertemplate=f"layer {number}: beyond the %{{x}} heaviest experts %{{y:.1%}}<extra></extra>",
            ),
            row=1,
            col=2,
        )
    figure.update_xaxes(title_text="expert", row=1, col=1)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_xaxes(title_text="experts kept, heaviest first", row=1, col=2, gridcolor=GRID)
    figure.update_yaxes(tickformat=".0%", row=1, col=2, gridcolor=GRID)
    figure.update_annotations(font_size=13)
    return in_both_themes(figure, height=330)


def in_both_themes(figure: go.Figure, height: int) -> go.Figure:
    """The figure with the page's ink on no ground of its own."""
    return figure.update_layout(
        height=height,
        margin={"l": 50, "r": 10, "t": 40, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "size": 12},
        legend={"font": {"size": 10}},
        hoverlabel={"bgcolor": HOVER, "bordercolor": INK, "font": {"color": HOVER_INK}, "align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK},
    )


def _how_often(steps: Sequence[Sequence[LayerTrace]], name: str, num_experts: int) -> np.ndarray:
    """[L, E]: the share of steps whose set `name` holds the expert."""
    count_LE = np.zeros((len(steps[0]), num_experts))
    for step in steps:
        for row, layer in enumerate(step):
            count_LE[row, getattr(layer, name)] += 1
    return count_LE / len(steps)
