r"""The house style: colours, sizes, and the small things that every figure needs.

The background is transparent and all text is one mid-grey that reads on the light and on the dark page alike.
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
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

__all__ = ["GREY", "PALETTE", "Plot", "png", "style"]

GREY = "#7a7a7a"  # contrast > 4 on white and on the dark page; also the colour of every baseline that does nothing
# The hues of Okabe and Ito, moved until each has contrast >= 3 on both pages and every pair stays apart (CIE76 > 20)
# for normal, deutan, protan and tritan sight: the tests recompute both.
PALETTE = ("#1257f5", "#ba8e01", "#c91ab5", "#01a95e", "#9d4f18", "#d96fba", "#b172fb")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
    (0, (1, 3)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
WIDTH = 5.0  # inches
PIXELS = 110  # CSS pixels per inch: 550 pixels wide on a desk, 10-pixel text on a phone
RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "image.interpolation": "nearest",
} | dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], GREY)


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
    buffer = io.BytesIO()
    small = io.BytesIO()
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


def array(x: Any) -> NDArray[Any]:
    """Anything torch reads, from any device, as a float64 array."""
    return torch.as_tensor(x).detach().cpu().double().numpy()


def labelled(**labels: str) -> None:
    for argument, label in labels.items():
        if not str(label).strip():
            raise ValueError(f"{argument}: expected a quantity with its unit, got {label!r}")


def colours(names: Any) -> list[str]:
    """Grey for what does nothing ("source ..."), the palette in order for the rest."""
    palette = cycle(PALETTE)
    return [GREY if str(name).lower().startswith("source") else next(palette) for name in names]


def group_colours(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A colour for each group's methods; methods in none are grey."""
    members = [name for group in groups.values() for name in group]
    if len(groups) > len(PALETTE) or len(set(members)) < len(members) or set(members) - set(names):
        raise ValueError(f"groups: expected at most {len(PALETTE)}, with methods of {names} once, got {dict(groups)}")
    found = {name: colour for group, colour in zip(groups.values(), PALETTE, strict=False) for name in group}
    return {name: found.get(name, GREY) for name in names}


def log_ticks(axis: Axis, formatter: str) -> None:
    """Under two decades 1, 2, 5, 10, ... in plain numbers, so that labels are neither few nor on top of each other."""
    low, high = axis.get_view_interval()
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def name_ends(axes: Axes) -> None:
    """Write each curve's name at its right end, moved apart just enough not to overlap."""
    axes.margins(x=0)
    to_axes = axes.transData + axes.transAxes.inverted()
    curves = [line for line in axes.lines if np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any()]
    ends = np.array([to_axes.transform(_last_point(line)) for line in curves]).reshape(-1, 2)
    heights = ends[:, 1]
    gap = 0.2 / 2.5  # a line of text over the height of the axes, both in inches
    order = np.argsort(heights)
    at = heights.copy()
    for below, above in zip(order, order[1:], strict=False):
        at[above] = max(at[above], at[below] + gap)
    if curves:  # pushed up to the names of the regions: all come down again
        at -= max(0.0, at.max() - max(1.0, heights.max()))
    for line, (x, y), place in zip(curves, ends, at, strict=True):
        same: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        leader: dict[str, Any] = {"linewidth": 1.2} if x > 0.99 else {"linewidth": 0.8, "linestyle": ":"}
        axes.plot([x, 1.05], [y, place], color=line.get_color(), scalex=False, scaley=False, **leader, **same)
        axes.text(1.06, place, str(line.get_label()), va="center", size=10, **same)


def _last_point(line: Line2D) -> tuple[float, float]:
    """Where a curve ends: its last point that is not missing."""
    x = np.asarray(line.get_xdata(), dtype=float)
    y = np.asarray(line.get_ydata(), dtype=float)
    last = np.flatnonzero(np.isfinite(y))[-1]
    return float(x[last]), float(y[last])
