"""Images and neighbour graphs in house style (see :mod:`peftref.plots`).

>>> import torch
>>> figure = images(torch.rand(1, 2, 1, 4, 4), ["clean"], ["shoe", "bag"])
>>> [axes.get_title() for axes in figure.axes]
['shoe', 'bag']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from .house import GREY, MARKERS, PALETTE, WIDTH, Plot, array, labelled, style

__all__ = ["graph", "images"]


def images(grid: Any, row_labels: Sequence[str], col_labels: Sequence[str]) -> Plot:
    """A gallery of images, with labels to the left and above.

    Args:
        grid: ``grid[r][c]`` is an image ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with values in [0, 1].
        row_labels: one for each row.
        col_labels: one for each column.

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
