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
from numpy.typing import NDArray

from .house import (
    DASHES,
    GREY,
    Plot,
    array,
    colours,
    labelled,
    log_ticks,
    name_ends,
    style,
)

__all__ = ["bars", "lines"]


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
    given = {name: np.atleast_2d(array(y)) for name, y in ys.items()}
    if not given or any(y.shape[1:] != x.shape for y in given.values()):
        shapes = {name: y.shape for name, y in given.items()}
        raise ValueError(f"ys: expected curves of shape (T,) or (seeds, T) with T = {x.size}, got {shapes}")
    bands = {name: _spread(y) for name, y in given.items()}
    return draw_curves(x, bands, xlabel, ylabel, regions=regions, xscale=xscale, yscale=yscale, ylim=ylim)


def draw_curves(
    x: NDArray[Any],
    bands: Mapping[str, tuple[Any, Any, Any]],
    xlabel: str,
    ylabel: str,
    *,
    regions: Sequence[tuple[float, float, str]],
    xscale: str,
    yscale: str,
    ylim: tuple[float, float] | None,
) -> Plot:
    """Curves in bands: name -> middle, lower and upper end, ``(T,)`` each; without a band the ends are None."""
    with style():
        upright = len(regions) * max((len(label) for *_, label in regions), default=0) > 40  # too long to lie
        figure = Plot(height=3.2 + 0.9 * upright)
        axes = figure.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale, xlim=(x.min(), x.max()))
        if xscale == "linear" and (x == x.round()).all():  # tasks, epochs: there is none at 1.5
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        for i, (start, stop, label) in enumerate(regions):
            axes.axvspan(start, stop, color=GREY, alpha=0.07 + 0.11 * (i % 2), linewidth=0)
            centre = np.clip((start, stop), x.min(), x.max()).mean()
            place = axes.get_xaxis_transform()
            axes.text(centre, 1.02, label, transform=place, rotation=90 * upright, ha="center", size=9)
        for (name, band), colour, dash in zip(bands.items(), colours(bands), cycle(DASHES), strict=False):
            middle, low, high = band
            axes.plot(x, middle, color=colour, linestyle=dash, label=name)
            if low is not None:
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
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


def _spread(y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
    """Mean over the seeds, and one standard deviation below and above it."""
    mean = y.mean(0)
    if len(y) == 1:
        return mean, None, None
    sd = y.std(0, ddof=1)
    return mean, mean - sd, mean + sd
