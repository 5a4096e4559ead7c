"""Results of several seeds: each seed in sight, the mean, and its 95 % interval by Student's t.

>>> from peftref import plots
>>> figure = plots.dots({"LoRA": [72.0, 74.1, 73.0], "Bone": [70.9, 73.6, 69.5]}, xlabel="accuracy (%)")
>>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
['LoRA', 'Bone']
>>> figure = plots.curves([0, 1], {"LoRA": [[60.0, 70.0], [61.0, 72.0]]}, "epoch", "accuracy (%)")
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .._checks import one_of
from ..results import interval, judge
from .charts import draw_curves
from .house import GREY, PALETTE, Plot, array, group_colours, labelled, style

__all__ = ["curves", "dots"]

ORDERS = ("given", "descending", "ascending")


def dots(
    panels: Mapping[str, Any],
    *,
    xlabel: str,
    highlight: Collection[str] = (),
    lines: Mapping[str, float] | None = None,
    order: str = "given",
    groups: Mapping[str, Sequence[str]] | None = None,
    paper: Mapping[str, float] | None = None,
    digits: int | None = None,
) -> Plot:
    """A row for each method, from top to bottom: pale dots for the seeds, the mean, and its 95 % interval (Student's).

    The axis is cropped to what is drawn and need not begin at zero.

    Args:
        panels: title -> method -> values, one for each seed; or, for a single panel, method -> values. A single panel
            shows no title. "source ..." is grey.
        xlabel: quantity and unit.
        highlight: methods in another colour.
        lines: name -> value of a dashed vertical line.
        order: of the rows from the top: as "given", or by mean in the first panel, "descending" or "ascending".
        groups: what the colours mean: name -> its methods, at most seven names, with a legend; methods in none of them
            are grey.
        paper: method -> the paper's number, a hollow diamond; for a single panel.
        digits: after the point, of the means that are written at the right; none are if not given.

    Raises:
        ValueError: an empty label, no panel, panels with other methods than the first, an unknown order, a group or a
            paper's number of a method that is not there, or values that :func:`peftref.results.judge` refuses.
    """
    labelled(xlabel=xlabel)
    one_of("order", order, ORDERS)
    if panels and not any(isinstance(panel, Mapping) for panel in panels.values()):
        panels = {"": panels}
    names = list(next(iter(panels.values()), ()))
    if not names or any(list(panel) != names for panel in panels.values()):
        raise ValueError(f"panels: expected the same methods in each, got {[[*panel] for panel in panels.values()]}")
    means = {name: judge(array(values).tolist()).mean for name, values in next(iter(panels.values())).items()}
    colours = _colours(names, highlight, groups)
    if set(paper or ()) - set(names) or (paper and len(panels) > 1):
        raise ValueError(f"paper: expected methods of {names} in a single panel, got {list(paper or ())}")
    if order != "given":
        names.sort(key=lambda name: means[name], reverse=order == "descending")
    with style():
        legend = bool(groups or paper)
        figure = Plot(height=1.0 + 0.34 * len(names) + 0.3 * legend)
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
        for axes, (title, panel) in zip(grid.flat, panels.items(), strict=True):
            for row, name in enumerate(names):
                mean = _row(axes, row, array(panel[name]).tolist(), colours[name])
                if digits is not None:
                    text = f"{mean:.{digits}f}".replace("-", "\N{MINUS SIGN}")
                    axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", size=10)
            for name, value in (paper or {}).items():
                axes.plot(value, names.index(name), "D", color=GREY, markersize=7, fillstyle="none")
            for name, value in (lines or {}).items():
                axes.axvline(value, color=GREY, linewidth=1, linestyle=(0, (5, 1.5)), zorder=0)
                axes.text(value, -0.75, name, ha="center", va="bottom", size=9)
            axes.set(yticks=range(len(names)), yticklabels=names)
            if len(panels) > 1:
                axes.set_title(title, size=11, pad=16 if lines else None)  # above the names of the lines
        grid[0, 0].set_ylim(len(names) - 0.5, -0.8 if lines else -0.5)
        figure.supxlabel(xlabel, size=11, color=GREY)
        handles = [Line2D([], [], color=c, marker="o", label=n) for n, c in zip(groups or (), PALETTE, strict=False)]
        if paper:
            handles.append(Line2D([], [], color=GREY, marker="D", linestyle="", fillstyle="none", label="the paper's"))
        if legend:
            figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), columnspacing=1)
    return figure


def curves(
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
    """Mean curves with their names at the right end, each in a band: the 95 % interval at every position.

    Args:
        x: positions, ``(T,)``.
        ys: name of the curve -> values, ``(seeds, T)``, two seeds or more; at most seven curves besides those in grey,
            "source ...".
        xlabel: quantity and unit.
        ylabel: quantity and unit.
        regions: ``(start, stop, label)`` of the domains behind the curves; a label may be empty.
        xscale: "linear" or "log".
        yscale: "linear" or "log".
        ylim: range of the vertical axis, the same for figures to be compared; default: that of the curves.

    Raises:
        ValueError: an empty label, no curve, more than seven, fewer than two seeds, or a curve whose last dimension is
            not that of ``x``.
    """
    labelled(xlabel=xlabel, ylabel=ylabel)
    x = array(x)
    given = {name: array(y) for name, y in ys.items()}
    if not given or any(y.ndim != 2 or len(y) < 2 or y.shape[1:] != x.shape for y in given.values()):
        shapes = {name: y.shape for name, y in given.items()}
        raise ValueError(f"ys: expected curves (seeds, T) of two or more seeds with T = {x.size}, got {shapes}")
    coloured = [name for name in given if not name.lower().startswith("source")]
    if len(coloured) > len(PALETTE):
        raise ValueError(f"ys: expected at most {len(PALETTE)} curves that can be told apart, got {len(coloured)}")
    bands = {name: interval(y) for name, y in given.items()}
    return draw_curves(x, bands, xlabel, ylabel, regions=regions, xscale=xscale, yscale=yscale, ylim=ylim)


def _colours(
    names: Sequence[str], highlight: Collection[str], groups: Mapping[str, Sequence[str]] | None
) -> dict[str, str]:
    if groups is None:
        plain = {name: GREY if name.lower().startswith("source") else PALETTE[0] for name in names}
        return {name: PALETTE[1] if name in highlight else colour for name, colour in plain.items()}
    return group_colours(names, groups)


def _row(axes: Axes, row: int, values: list[float], colour: str) -> float:
    """Interval, seeds and mean of one method; returns the mean."""
    mean, low, high, _ = judge(values)
    axes.plot([low, high], [row, row], color=colour, linewidth=1.2)
    axes.plot(values, np.full(len(values), row), "o", color=colour, alpha=0.35, markersize=5)
    axes.plot(mean, row, "|", color=colour, markersize=13, markeredgewidth=2.5)
    return mean
