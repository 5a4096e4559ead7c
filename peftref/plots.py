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
>>> png(figure)[:4]
b'\x89PNG'
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

__all__ = ["GREY", "PALETTE", "Plot", "bars", "graph", "images", "lines", "png", "style"]

GREY = "#7a7a7a"  # contrast > 4 on white and on the dark page; also the colour of every baseline that does nothing
# The hues of Okabe and Ito, moved until each has contrast >= 3 on both pages and every pair stays apart (CIE76 > 20)
# for normal, deutan, protan and tritan sight: the tests recompute both.
PALETTE = ("#1858f5", "#ba8e01", "#d11ebf", "#01a95e", "#9d4f18")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
WIDTH, PIXELS = 5.0, 110  # inches, and CSS pixels per inch: 550 pixels wide on a desk, 10-pixel text on a phone
RC: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "legend.fontsize": 10, "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
    "axes.linewidth": 0.8, "lines.linewidth": 2.0, "image.interpolation": "nearest",
} | dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], GREY)  # fmt: skip


def style() -> AbstractContextManager[None]:
    """House style for a figure of your own, ``with plots.style(): ...``; matplotlib's own settings return after it."""
    return mpl.rc_context(cast(Any, RC))  # matplotlib's type lists every name there is


class Plot(Figure):
    """A figure in house style that shows itself in a notebook as one sharp, transparent PNG."""

    def __init__(self, width: float = WIDTH, height: float = 3.2) -> None:
        super().__init__(figsize=(width, height), layout="constrained")

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        picture = {"image/png": b64encode(png(self)).decode(), "text/plain": "<Plot>"}
        return picture, {"image/png": {"width": round(self.get_figwidth() * PIXELS)}}


def png(figure: Figure) -> bytes:
    """The figure as PNG at twice the page's resolution; the same figure gives the same bytes."""
    buffer, small = io.BytesIO(), io.BytesIO()
    with style():
        if engine := figure.get_layout_engine():
            for _ in range(3):  # the layout settles in a few rounds; then freeze it, or drawing again would move things
                engine.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(buffer, format="png", dpi=2 * PIXELS, metadata={"Software": None})
    if any(axes.images for axes in figure.axes):  # photographs keep all their colours
        return buffer.getvalue()
    Image.open(buffer).quantize(method=Image.Quantize.FASTOCTREE).save(small, format="png", optimize=True)
    return small.getvalue()


def lines(
    x: Any, ys: Mapping[str, Any], xlabel: str, ylabel: str, *, regions: Sequence[tuple[float, float, str]] = (),
    xscale: str = "linear", yscale: str = "linear", ylim: tuple[float, float] | None = None,
) -> Plot:  # fmt: skip
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
    _labelled(xlabel=xlabel, ylabel=ylabel)
    x = _array(x)
    curves = {name: np.atleast_2d(_array(y)) for name, y in ys.items()}
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
            middle, place = np.clip((start, stop), x.min(), x.max()).mean(), axes.get_xaxis_transform()
            axes.text(middle, 1.02, label, transform=place, rotation=90 * upright, ha="center", size=9)
        for (name, y), colour, dash in zip(curves.items(), _colours(curves), cycle(DASHES), strict=False):
            mean = y.mean(0)
            axes.plot(x, mean, color=colour, linestyle=dash, label=name)
            if len(y) > 1:
                sd = y.std(0, ddof=1)
                axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
        axes.set(ylim=ylim)
        for axis, scale in ((axes.xaxis, xscale), (axes.yaxis, yscale)):
            if scale == "log":
                _log_ticks(axis, "{x:g}")
        _name_ends(axes)
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
    _labelled(xlabel=xlabel, ylabel=ylabel)
    if mean.empty:
        raise ValueError(f"mean: expected at least one row and one column, got shape {mean.shape}")
    if spread is not None and not (spread.index.equals(mean.index) and spread.columns.equals(mean.columns)):
        raise ValueError(f"spread: expected the rows and columns of mean, got {[*spread.index]} x {[*spread.columns]}")
    rows, columns = mean.shape
    with style():
        figure = Plot(height=1.2 + rows * (0.17 * columns + 0.14))
        axes = figure.subplots()
        for i, (name, colour) in enumerate(zip(mean.columns, _colours(mean.columns), strict=True)):
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
    rows, columns = len(grid), len(grid[0])
    if (len(row_labels), len(col_labels)) != (rows, columns) or any(len(row) != columns for row in grid):
        got = f"{len(row_labels)} x {len(col_labels)}"
        raise ValueError(f"labels: expected {rows} x {columns} as in the grid, got {got}")
    with style():
        side, upright = min((WIDTH - 1) / columns, 1.2), columns > 4
        figure = Plot(height=rows * side + 0.2 + (0.085 * max(map(len, col_labels)) if upright else 0.2))
        for r, line in enumerate(figure.subplots(rows, columns, squeeze=False)):
            for c, axes in enumerate(line):
                picture = _array(grid[r][c])
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
    points, edges = _array(points), _array(edges).astype(int).reshape(-1, 2)
    _labelled(**{f"panels[{i}]": title for i, title in enumerate(panels)})
    for title, labels in panels.items():
        given = _array(labels)
        if given.shape != points.shape[:1] or given.max(initial=0) >= len(names):
            raise ValueError(f"panels[{title!r}]: expected {len(points)} labels below {len(names)}, got {given}")
    if not panels:
        raise ValueError("panels: expected at least one, got none")
    with style():
        figure = Plot(height=WIDTH / len(panels) + 0.9)
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, labels) in zip(every, panels.items(), strict=True):
            labels = _array(labels)
            axes.plot(*points[edges].transpose(2, 1, 0), color=GREY, alpha=0.35, linewidth=0.6, zorder=1)
            for k, (name, marker, colour) in enumerate(zip(names, cycle(MARKERS), cycle(PALETTE), strict=False)):
                # a name absent from one panel still has its place in the common legend
                axes.plot(*points[labels == k].T, marker, color=colour, markersize=4.5, label=name)
            if truth is not None:
                wrong = points[labels != _array(truth)].T
                axes.plot(*wrong, "o", color=GREY, markersize=10, fillstyle="none", label="wrong")
            axes.set(title=title, xticks=[], yticks=[], aspect="equal")
            axes.spines[:].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, columnspacing=1)
    return figure


def _array(x: Any) -> NDArray[Any]:
    """Anything torch reads, from any device, as a float64 array."""
    return torch.as_tensor(x).detach().cpu().double().numpy()


def _labelled(**labels: str) -> None:
    for argument, label in labels.items():
        if not str(label).strip():
            raise ValueError(f"{argument}: expected a quantity with its unit, got {label!r}")


def _colours(names: Any) -> list[str]:
    """Grey for what does nothing ("source ..."), the palette in order for the rest."""
    palette = cycle(PALETTE)
    return [GREY if str(name).lower().startswith("source") else next(palette) for name in names]


def _log_ticks(axis: Axis, formatter: str) -> None:
    """Under two decades 1, 2, 5, 10, ... in plain numbers, so that labels are neither few nor on top of each other."""
    low, high = axis.get_view_interval()
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def _name_ends(axes: Axes) -> None:
    """Write each curve's name at its right end, moved apart just enough not to overlap."""
    axes.margins(x=0)
    to_axes = axes.transData + axes.transAxes.inverted()
    drawn = [(line, np.asarray(line.get_ydata())) for line in axes.lines]
    curves = [(line, y[np.isfinite(y)][-1]) for line, y in drawn if np.isfinite(y).any()]
    ends = np.array([to_axes.transform((axes.get_xlim()[1], y))[1] for _, y in curves])
    gap = 0.2 / 2.5  # a line of text over the height of the axes, both in inches
    order, at = np.argsort(ends), ends.copy()
    for below, above in zip(order, order[1:], strict=False):
        at[above] = max(at[above], at[below] + gap)
    at -= max(0.0, at.max() - max(1.0, ends.max()))  # pushed up to the names of the regions: all come down again
    for (line, _), end, place in zip(curves, ends, at, strict=True):
        same: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([1, 1.05], [end, place], color=line.get_color(), linewidth=1.2, scalex=False, scaley=False, **same)
        axes.text(1.06, place, str(line.get_label()), va="center", size=10, **same)
