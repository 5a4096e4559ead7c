"""Small multiples in house style: the same picture once for each case, on common axes (see :mod:`peftref.plots`).

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> figure = boxes({"A": {"fe": rng.normal(size=20)}, "B": {"fe": rng.normal(size=20)}}, xlabel="estimate", columns=2)
>>> [axes.get_title() for axes in figure.axes]
['A', 'B']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from .house import GREY, PALETTE, Plot, array, group_colours, labelled, style

__all__ = ["boxes", "scatter"]


def boxes(
    panels: Mapping[str, Mapping[str, Any]],
    *,
    xlabel: str,
    truth: float | None = None,
    columns: int = 3,
    xlim: tuple[float, float] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Plot:
    """Horizontal boxplots: a panel for each case, a box for each method (quartiles; whiskers to 1.5 times the box).

    Args:
        panels: title -> name of the method -> values; all panels have the same methods, listed from the top.
        xlabel: quantity and unit.
        truth: a line at the value that would be right.
        columns: panels beside each other.
        xlim: range of the axis; what lies outside is drawn as a mark at the edge.
        groups: what the colours mean: name -> its methods, at most seven names, with a legend; methods in none of them
            are grey. Without groups each method has a colour.

    Raises:
        ValueError: an empty label, no panel, panels with different methods, a method without values, or a group of a
            method that is not there.
    """
    labelled(xlabel=xlabel, **{f"panels[{i}]": title for i, title in enumerate(panels)})
    names = [list(methods) for methods in panels.values()]
    if not panels or not names[0] or any(other != names[0] for other in names):
        raise ValueError(f"panels: expected at least one panel, each with the same methods, got {names}")
    if empty := [name for methods in panels.values() for name, values in methods.items() if not array(values).size]:
        raise ValueError(f"panels: expected values for every method, got none for {empty[0]!r}")
    rows = -(-len(panels) // columns)
    height = 0.65 + rows * (0.21 * len(names[0]) + 0.35) + 0.3 * bool(groups)
    palette = dict(zip(names[0], cycle(PALETTE), strict=False)) if groups is None else group_colours(names[0], groups)
    with style():
        figure = Plot(height=height)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        _leave_out(grid, len(panels))
        for axes, (title, methods) in zip(grid.flat, panels.items(), strict=False):
            if truth is not None:
                axes.axvline(truth, color=GREY, linewidth=1, zorder=0)
            for i, (name, values) in enumerate(methods.items()):
                colour = palette[name]
                values = array(values).ravel()
                line = {"color": colour, "linewidth": 1.2}
                flier = {"marker": ".", "markersize": 3, "markerfacecolor": colour, "markeredgecolor": colour}
                shown = values if xlim is None else values.clip(*xlim)
                axes.boxplot(
                    [shown],
                    positions=[i],
                    orientation="horizontal",
                    widths=0.6,
                    boxprops=line,
                    whiskerprops=line,
                    capprops=line,
                    medianprops=line | {"linewidth": 2},
                    flierprops=flier,
                )
            axes.set_title(title, size=11)
            axes.set(yticks=range(len(names[0])), yticklabels=names[0], xlim=xlim)
        grid[0, 0].invert_yaxis()
        figure.supxlabel(xlabel, size=11, color=GREY)
        if groups:
            handles = [Line2D([], [], color=palette[some[0]], marker="s", label=name) for name, some in groups.items()]
            figure.legend(handles=handles, loc="outside upper center", ncols=min(len(groups), 3), columnspacing=1)
    return figure


def scatter(
    panels: Mapping[str, tuple[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    slopes: Mapping[str, float] | None = None,
    truth: float | None = None,
    columns: int = 2,
) -> Plot:
    """Clouds of points through the origin, with their fitted line, and in grey the line that would be right.

    Args:
        panels: title -> x and y, ``(n,)`` each.
        xlabel, ylabel: quantities and units.
        slopes: of the fitted line of each panel.
        truth: slope of the grey line.
        columns: panels beside each other.

    Raises:
        ValueError: an empty label, no panel, or x and y of different lengths.
    """
    labelled(xlabel=xlabel, ylabel=ylabel, **{f"panels[{i}]": title for i, title in enumerate(panels)})
    points = {title: (array(x), array(y)) for title, (x, y) in panels.items()}
    if not points or any(x.shape != y.shape or x.ndim != 1 for x, y in points.values()):
        shapes = {title: (x.shape, y.shape) for title, (x, y) in points.items()}
        raise ValueError(f"panels: expected at least one pair of shapes (n,), got {shapes}")
    rows = -(-len(panels) // columns)
    with style():
        figure = Plot(height=0.7 + 2.0 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        _leave_out(grid, len(panels))
        ends = np.array([-1, 1]) * max(np.abs(x).max() for x, _ in points.values())
        for axes, (title, (x, y)), colour in zip(grid.flat, points.items(), cycle(PALETTE), strict=False):
            axes.plot(x, y, ".", color=colour, markersize=2.5, alpha=0.35, markeredgewidth=0)
            if truth is not None:
                axes.plot(ends, truth * ends, color=GREY, linestyle=(0, (5, 1.5)))
            if slopes is not None:
                axes.plot(ends, slopes[title] * ends, color=colour)
            axes.set_title(title if slopes is None else f"{title}: slope {slopes[title]:.2f}", size=11)
        figure.supxlabel(xlabel, size=11, color=GREY)
        figure.supylabel(ylabel, size=11, color=GREY)
    return figure


def _leave_out(grid: NDArray[Any], n: int) -> None:
    """No panels after the n-th; those that now have nothing below them get the numbers of the axis."""
    for axes in grid.flat[n:]:
        axes.set_visible(False)
    for axes in grid[:-1].flat[max(0, n - grid.shape[1]) :]:
        axes.tick_params(labelbottom=True)
