r"""The house style: every figure of the book is one call to a function below, which returns the figure.

The background is transparent and all text is one mid-grey that reads on the light and on the dark page alike; curves
are told apart by colour, dash and a label at their end, so a figure survives colour blindness, print and a phone. No
function touches ``pyplot`` or any other global state; a figure shows itself as the last expression of a cell.

How a chapter shows a figure: alt text, caption and name belong to the *cell*, as metadata that the book reads::

    {"mystnb": {"image": {"alt": "Error rises from 20 to 80 % along the stream", "classes": "dark-light"},
                "figure": {"caption": "Error along the stream.", "name": "fig-lame-stream"}}}

The text refers to it by ``{numref}`fig-lame-stream```. (Alt text handed to ``display(..., metadata=...)`` never reaches
the page.) The class ``dark-light`` keeps the theme from dimming the picture.

>>> import torch
>>> figure = lines(range(3), {"source": torch.tensor([[1., 2., 3.], [1., 2., 5.]])}, "batch", "error (%)")
>>> from peftref.plots import png
>>> png(figure)[:4]
b'\x89PNG'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from .house import (
    DASHES,
    GREY,
    MARKERS,
    PALETTE,
    WIDTH,
    Plot,
    array,
    colours,
    labelled,
    log_ticks,
    name_ends,
    style,
)

__all__ = ["bars", "graph", "images", "lines"]


def lines(
    x: Any,
    ys: Mapping[str, Any],
    xlabel: str,
    ylabel: str,
    *,
    regions: Sequence[tuple[float, float, str]] = (),
    xscale: str = "linear",
    yscale: str = "linear",
    ylim: tuple[float, float] | None = None,
) -> Plot:
    """Curves with their names at the right end; curves of several seeds as mean and a band of one standard deviation.

    Args:
        x: positions, ``(T,)``.
        ys: name of the curve -> values, ``(T,)`` or ``(seeds, T)``; NaN leaves a gap. "source ..." is grey.
        xlabel: quantity and unit.
        ylabel: quantity and unit.
        regions: ``(start, stop, label)`` of the domains behind the curves; a label may be empty.
        xscale: "linear" or "log".
        yscale: "linear" or "log".
        ylim: range of the vertical axis, the same for figures to be compared; default: that of the curves.

    Raises:
        ValueError: an empty label, no curve, or a curve whose last dimension is not that of ``x``.
    """
    labelled(xlabel=xlabel, ylabel=ylabel)
    x = array(x)
    curves = {name: np.atleast_2d(array(y)) for name, y in ys.items()}
    if not curves or any(y.shape[1:] != x.shape for y in curves.values()):
        shapes = {name: y.shape for name, y in curves.items()}
        raise ValueError(f"ys: expected curves of shape (T,) or (seeds, T) with T = {x.size}, got {shapes}")
    with style():
        upright = len(regions) * max((len(label) for *_, label in regions), default=0) > 40  # too long to lie
        figure = Plot(height=3.2 + 0.9 * upright)
        axes = figure.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale, xlim=(x.min(), x.max()))
        if xscale == "linear" and (x == x.round()).all():  # tasks, epochs: there is none at 1.5
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        for i, (start, stop, label) in enumerate(regions):
            axes.axvspan(start, stop, color=GREY, alpha=0.07 + 0.11 * (i % 2), linewidth=0)
            middle = np.clip((start, stop), x.min(), x.max()).mean()
            place = axes.get_xaxis_transform()
            axes.text(middle, 1.02, label, transform=place, rotation=90 * upright, ha="center", size=9)
        for (name, y), colour, dash in zip(curves.items(), colours(curves), cycle(DASHES), strict=False):
            mean = y.mean(0)
            axes.plot(x, mean, color=colour, linestyle=dash, label=name)
            if len(y) > 1:
                sd = y.std(0, ddof=1)
                axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
        axes.set(ylim=ylim)
        for axis, scale in ((axes.xaxis, xscale), (axes.yaxis, yscale)):
            if scale == "log":
                log_ticks(axis, "{x:g}")
        name_ends(axes)
    return figure


def bars(mean: pd.DataFrame, spread: pd.DataFrame | None = None, *, xlabel: str, ylabel: str) -> Plot:
    """Grouped horizontal bars, so that every name reads upright: a group per row of ``mean``, a bar per column.

    Args:
        mean: heights; index = groups from top to bottom, columns = what is compared.
        spread: half-length of the error bars, same index and columns as ``mean``.
        xlabel: the quantity and its unit.
        ylabel: what the groups are.

    Raises:
        ValueError: an empty label, an empty table, or a spread with other rows or columns than the mean.
    """
    labelled(xlabel=xlabel, ylabel=ylabel)
    if mean.empty:
        raise ValueError(f"mean: expected at least one row and one column, got shape {mean.shape}")
    if spread is not None and not (spread.index.equals(mean.index) and spread.columns.equals(mean.columns)):
        raise ValueError(f"spread: expected the rows and columns of mean, got {[*spread.index]} x {[*spread.columns]}")
    rows, columns = mean.shape
    with style():
        figure = Plot(height=1.2 + rows * (0.17 * columns + 0.14))
        axes = figure.subplots()
        for i, (name, colour) in enumerate(zip(mean.columns, colours(mean.columns), strict=True)):
            at = np.arange(rows) + 0.8 * ((i + 0.5) / columns - 0.5)
            # pale inside: the error bar shows on grey too
            bar: dict[str, Any] = {"color": (colour, 0.5), "edgecolor": colour, "label": name}
            if spread is not None:
                bar |= {"xerr": spread[name], "error_kw": {"ecolor": GREY, "capsize": 2}}
            axes.barh(at, mean[name], 0.7 / columns, **bar)
        axes.set(xlabel=xlabel, ylabel=ylabel, yticks=range(rows), yticklabels=[str(name) for name in mean.index])
        axes.set_ylim(rows - 0.5, -0.5)  # the first group at the top, and no empty ends
        if columns > 1:
            figure.legend(loc="outside upper center", ncols=min(columns, 3))
    return figure


def images(grid: Any, row_labels: Sequence[str], col_labels: Sequence[str]) -> Plot:
    """A gallery: ``grid[r][c]`` is an image ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with values in [0, 1].

    Raises:
        ValueError: labels that do not match the rows and columns of the grid.
    """
    rows = len(grid)
    columns = len(grid[0])
    if (len(row_labels), len(col_labels)) != (rows, columns) or any(len(row) != columns for row in grid):
        got = f"{len(row_labels)} x {len(col_labels)}"
        raise ValueError(f"labels: expected {rows} x {columns} as in the grid, got {got}")
    with style():
        side = min((WIDTH - 1) / columns, 1.2)
        upright = columns > 4
        figure = Plot(height=rows * side + 0.2 + (0.085 * max(map(len, col_labels)) if upright else 0.2))
        for r, line in enumerate(figure.subplots(rows, columns, squeeze=False)):
            for c, axes in enumerate(line):
                picture = array(grid[r][c])
                picture = picture.transpose(1, 2, 0) if picture.ndim == 3 else picture[..., None]  # (H, W, 1 or 3)
                axes.imshow(np.broadcast_to(picture, (*picture.shape[:2], 3)).clip(0, 1))
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if r == 0:
                    axes.set_title(col_labels[c], size=10, rotation=90 * upright)
                if c == 0:
                    axes.set_ylabel(row_labels[r], rotation=0, ha="right", va="center", size=10)
    return figure


def graph(points: Any, edges: Any, panels: Mapping[str, Any], names: Sequence[str], *, truth: Any = None) -> Plot:
    """The same neighbour graph once per panel, its nodes coloured and shaped by that panel's labels (before, after).

    Args:
        points: places of the nodes in the plane, ``(N, 2)``; the axes of an embedding have no unit, so none are drawn.
        edges: pairs of node numbers, ``(E, 2)``.
        panels: title -> label of each node, integers ``(N,)``.
        names: what label 0, 1, ... mean.
        truth: the right labels, ``(N,)``; nodes labelled otherwise get a grey ring.

    Raises:
        ValueError: no panel, an empty title, or labels that do not fit ``points`` and ``names``.
    """
    points = array(points)
    edges = array(edges).astype(int).reshape(-1, 2)
    labelled(**{f"panels[{i}]": title for i, title in enumerate(panels)})
    for title, labels in panels.items():
        given = array(labels)
        if given.shape != points.shape[:1] or given.max(initial=0) >= len(names):
            raise ValueError(f"panels[{title!r}]: expected {len(points)} labels below {len(names)}, got {given}")
    if not panels:
        raise ValueError("panels: expected at least one, got none")
    with style():
        figure = Plot(height=WIDTH / len(panels) + 0.9)
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, labels) in zip(every, panels.items(), strict=True):
            labels = array(labels)
            axes.plot(*points[edges].transpose(2, 1, 0), color=GREY, alpha=0.35, linewidth=0.6, zorder=1)
            for k, (name, marker, colour) in enumerate(zip(names, cycle(MARKERS), cycle(PALETTE), strict=False)):
                # a name absent from one panel still has its place in the common legend
                axes.plot(*points[labels == k].T, marker, color=colour, markersize=4.5, label=name)
            if truth is not None:
                wrong = points[labels != array(truth)].T
                axes.plot(*wrong, "o", color=GREY, markersize=10, fillstyle="none", label="wrong")
            axes.set(title=title, xticks=[], yticks=[], aspect="equal")
            axes.spines[:].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, columnspacing=1)
    return figure
