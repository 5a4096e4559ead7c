"""Results of several seeds: every seed a dot, and the mean with its 95 % interval, on an axis that is cropped to them.

>>> from peftref import plots
>>> figure = plots.dots({"digits": {"LoRA": [72.0, 74.1, 73.0], "Bone": [70.9, 73.6, 69.5]}}, xlabel="accuracy (%)")
>>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
['LoRA', 'Bone']
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..results import judge
from .house import GREY, PALETTE, Plot, array, labelled, style

__all__ = ["dots"]


def dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    xlabel: str,
    highlight: Collection[str] = (),
    lines: Mapping[str, float] | None = None,
) -> Plot:
    """A row for each method, from top to bottom: pale dots for the seeds, the mean, and its 95 % interval (Student's).

    Args:
        panels: title -> method -> values, one for each seed. A single panel shows no title.
        xlabel: quantity and unit.
        highlight: methods in another colour.
        lines: name -> value of a dashed vertical line.

    Raises:
        ValueError: an empty label, no panel, panels with other methods than the first, or values that
            :func:`peftref.results.judge` refuses.
    """
    labelled(xlabel=xlabel)
    names = list(next(iter(panels.values()), ()))
    if not names or any(list(panel) != names for panel in panels.values()):
        raise ValueError(f"panels: expected the same methods in each, got {[[*panel] for panel in panels.values()]}")
    with style():
        figure = Plot(height=1.0 + 0.34 * len(names))
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
        for axes, (title, panel) in zip(grid.flat, panels.items(), strict=True):
            for row, name in enumerate(names):
                values = array(panel[name])
                mean, low, high, _ = judge(values.tolist())
                colour = PALETTE[1] if name in highlight else PALETTE[0]
                axes.plot([low, high], [row, row], color=colour, linewidth=1.2)
                axes.plot(values, np.full(len(values), row), "o", color=colour, alpha=0.35, markersize=5)
                axes.plot(mean, row, "|", color=colour, markersize=13, markeredgewidth=2.5)
            for name, value in (lines or {}).items():
                axes.axvline(value, color=GREY, linewidth=1, linestyle=(0, (5, 1.5)), zorder=0)
                axes.text(value, -0.75, name, ha="center", va="bottom", size=9)
            axes.set(yticks=range(len(names)), yticklabels=names)
            if len(panels) > 1:
                axes.set_title(title, size=11)
        grid[0, 0].set_ylim(len(names) - 0.5, -0.8)
        figure.supxlabel(xlabel, size=11)
    return figure
