"""Cost against gain: one named point for each method, in the house style of :mod:`peftref.plots`.

>>> shown = tradeoff({"LoRA": (16384, 72.0, 1.0), "TeRA": (2624, 71.0, 1.5)}, xlabel="trained numbers", ylabel="%")
>>> [text.get_text() for text in shown.legends[0].get_texts()]
['LoRA', 'TeRA']
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any, cast

from .house import GREY, MARKERS, Plot, colours, labelled, log_ticks, style

__all__ = ["tradeoff"]


def tradeoff(
    points: Mapping[str, tuple[float, float, float]],
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = "log",
    lines: Mapping[str, float] | None = None,
    ylim: tuple[float, float] | None = None,
    height: float = 3.8,
) -> Plot:
    """Points with vertical error bars, named by colour and mark in a legend.

    Args:
        points: name -> cost, gain, and half-length of the error bar of the gain.
        xlabel, ylabel: the cost and the gain, with units.
        xscale: "log" or "linear".
        lines: name -> gain of a horizontal line in grey, for what has no cost on this axis.
        ylim: range of the gain; default: that of the points and lines.
        height: in inches.

    Raises:
        ValueError: an empty label, no point, a number that is not finite, or a cost below or at zero on a logarithmic
            axis.
    """
    labelled(xlabel=xlabel, ylabel=ylabel)
    if not points:
        raise ValueError("points: expected at least one, got none")
    for name, numbers in points.items():
        if not all(map(math.isfinite, numbers)) or (xscale == "log" and numbers[0] <= 0):
            raise ValueError(f"points: expected finite numbers, and costs above 0 on a log axis, got {name}: {numbers}")
    with style():
        figure = Plot(height=height)
        axes = figure.subplots()
        bar: dict[str, Any] = {"linestyle": "none", "markersize": 7, "capsize": 2, "ecolor": GREY, "elinewidth": 1}
        for name, colour, marker in zip(points, colours(points), cycle(MARKERS), strict=False):
            axes.errorbar(*points[name], color=colour, marker=marker, label=name, **bar)
        for name, y in (lines or {}).items():
            axes.axhline(y, color=GREY, linewidth=1, linestyle=(0, (5, 1.5)), zorder=0)
            axes.text(1.0, y, name, transform=axes.get_yaxis_transform(), ha="right", va="bottom", size=10)
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, ylim=ylim)
        axes.margins(x=0.12, y=0.1)
        if xscale == "log":
            axes.xaxis.set_major_formatter("{x:,.0f}")
            log_ticks(axes.xaxis, "{x:,.0f}")
        handles, names = axes.get_legend_handles_labels()
        marks = [cast(Any, handle).lines[0] for handle in handles]  # the mark without its bar
        figure.legend(marks, names, loc="outside lower center", ncols=4, columnspacing=1, handletextpad=0.3)
    return figure
