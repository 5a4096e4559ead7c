r"""Schematics of a method: boxes, small matrices and arrows, frozen and trained parameters told apart by colour.

Places are in inches, from the lower left corner of a figure that is 5 wide (a page's column) and as high as it is asked
to be; text has the same size in every schematic, and a box is as large as its text.

>>> from peftref import plots
>>> nodes = {
...     "x": plots.Box(0.4, 1.0, "$x$", "data"),
...     "W": plots.Matrix(1.8, 1.5, (6, 6), "$W$", "frozen"),
...     "A": plots.Matrix(1.8, 0.6, (2, 6), "$A$", "trained"),
...     "sum": plots.Box(3.2, 1.0, "+", "operation"),
...     "h": plots.Box(4.4, 1.0, "$h$", "data"),
... }
>>> figure = plots.diagram(nodes, [("x", "W"), ("x", "A"), ("W", "sum"), ("A", "sum"), ("sum", "h")], height=2.2)
>>> [text.get_text() for text in figure.legends[0].get_texts()]
['frozen', 'trained']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from numpy.typing import NDArray

from .house import GREY, PALETTE, WIDTH, Plot, style

__all__ = ["Arrow", "Box", "Matrix", "diagram"]

# kind -> colour; those without a colour of their own stand in no legend
COLOURS = {"frozen": GREY, "trained": PALETTE[0], "computed": PALETTE[3]}
KINDS = (*COLOURS, "plain", "data", "operation")
PAD = 0.09  # inches between a text and the edge of its box
LIFT = 0.06  # inches between a matrix and its name, an arrow and its text
LEGEND = 0.3  # inches


@dataclass(frozen=True)
class Box:
    """A text in a box.

    Attributes:
        x: of the centre, in inches from the left.
        y: of the centre, in inches from below.
        text: one line or several; ``$...$`` is maths.
        kind: "frozen", "trained" or "computed" (without training) parameters; "plain"; "data", without an outline;
            "operation", a circle.
        size: width and height in inches; those of the text if not given.
        colour: another one than that of the kind, one of ``PALETTE``.
    """

    x: float
    y: float
    text: str
    kind: str = "plain"
    size: tuple[float, float] | None = None
    colour: str | None = None


@dataclass(frozen=True)
class Matrix:
    """A grid of small cells with its name below or above.

    Attributes:
        x: of the centre, in inches from the left.
        y: of the centre, in inches from below.
        cells: number of rows and columns, or an array of shades in [0, 1], ``(rows, columns)``.
        text: the name.
        kind: as of :class:`Box`.
        cell: width and height of a cell in inches.
        colour: another one than that of the kind, one of ``PALETTE``.
        above: the name stands above, where arrows come from below.
    """

    x: float
    y: float
    cells: Any
    text: str = ""
    kind: str = "plain"
    cell: float = 0.12
    colour: str | None = None
    above: bool = False

    @property
    def shades(self) -> NDArray[Any]:
        """One number in [0, 1] for each cell."""
        if isinstance(self.cells, tuple) and len(self.cells) == 2:
            return np.full(self.cells, 0.35)
        return np.asarray(self.cells, float)


@dataclass(frozen=True)
class Arrow:
    """From one node to another.

    Attributes:
        start: name of a node.
        end: name of a node.
        text: beside its middle.
        bend: 0 is straight; positive bends to the right of its way, negative to the left.
        dashed: for what flows backwards, or only at times.
        colour: grey unless given, one of ``PALETTE``.
    """

    start: str
    end: str
    text: str = ""
    bend: float = 0.0
    dashed: bool = False
    colour: str = GREY


def diagram(
    nodes: Mapping[str, Box | Matrix],
    arrows: Sequence[Arrow | tuple[str, str] | tuple[str, str, str]] = (),
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    height: float = 2.4,
) -> Plot:
    """A schematic; a legend says which colour is frozen, trained or computed, if there are such nodes.

    Args:
        nodes: name -> what is drawn; names are only for the arrows and groups.
        arrows: ``(start, end)``, ``(start, end, text)``, or an :class:`Arrow`.
        groups: title -> names of the nodes in a common frame.
        height: of the drawing in inches; a legend takes its own room below.

    Raises:
        ValueError: no node, an unknown kind, an arrow or group that names no node, or a node outside the figure.
    """
    drawn = [arrow if isinstance(arrow, Arrow) else Arrow(*arrow) for arrow in arrows]
    _check(nodes, drawn, groups or {})
    kinds = [kind for kind in COLOURS if any(n.kind == kind and n.colour is None for n in nodes.values())]
    below = LEGEND if kinds else 0.0
    with style():
        figure = Plot(height=height + below)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(-below, height))
        axes.set_axis_off()
        placed = {name: _node(axes, node) for name, node in nodes.items()}
        extents = {name: extent for name, (extent, _) in placed.items()}
        rooms = {name: room for name, (_, room) in placed.items()}
        for name, room in rooms.items():
            if room[:, 0].min() < 0 or room[0, 1] > WIDTH or room[1, 1] > height:
                raise ValueError(f"nodes: expected places within {WIDTH:g} x {height:g} inches, got {name!r} outside")
        for title, names in (groups or {}).items():
            _group(axes, title, np.stack([rooms[name] for name in names]))
        for arrow in drawn:
            _arrow(axes, arrow, extents)
        patches = [Patch(facecolor=(COLOURS[kind], 0.3), edgecolor=COLOURS[kind], label=kind) for kind in kinds]
        if patches:
            figure.legend(handles=patches, loc="lower center", ncols=len(kinds), borderaxespad=0, handlelength=1.2)
    return figure


def _check(nodes: Mapping[str, Box | Matrix], arrows: Sequence[Arrow], groups: Mapping[str, Sequence[str]]) -> None:
    if not nodes:
        raise ValueError("nodes: expected at least one, got none")
    for name, node in nodes.items():
        if node.kind not in KINDS:
            raise ValueError(f"nodes: expected a kind of {KINDS}, got {node.kind!r} for {name!r}")
        if isinstance(node, Matrix) and (node.shades.ndim != 2 or not node.shades.size):
            raise ValueError(f"nodes: expected cells (rows, columns), got shape {node.shades.shape} for {name!r}")
    named = {
        "arrows": {name for arrow in arrows for name in (arrow.start, arrow.end)},
        "groups": {name for names in groups.values() for name in names},
    }
    for argument, names in named.items():
        if not names <= set(nodes):
            raise ValueError(f"{argument}: expected names of {list(nodes)}, got {sorted(names - set(nodes))}")


def _node(axes: Axes, node: Box | Matrix) -> tuple[NDArray[Any], NDArray[Any]]:
    """Draw it; returns its extent, ``[[left, right], [bottom, top]]``, and that of all its room, with its name."""
    colour = node.colour or COLOURS.get(node.kind, GREY)
    if isinstance(node, Matrix):
        return _matrix(axes, node, colour)
    text = axes.text(node.x, node.y, node.text, ha="center", va="center", zorder=3)
    width, height = node.size or _size(axes, text)
    if node.kind == "operation":
        width = height = max(width, height) - (PAD if node.size is None else 0)
    extent = np.array([[node.x - width / 2, node.x + width / 2], [node.y - height / 2, node.y + height / 2]])
    look: dict[str, Any] = {"facecolor": (colour, 0.15), "edgecolor": colour, "linewidth": 1.4, "zorder": 2}
    if node.kind in ("plain", "operation") and node.colour is None:
        look["facecolor"] = "none"
    if node.kind == "operation":
        axes.add_patch(Ellipse((node.x, node.y), width, height, **look))
    elif node.kind != "data":
        look["boxstyle"] = "round,pad=0,rounding_size=0.07"
        axes.add_patch(FancyBboxPatch(_pair(extent[:, 0]), width, height, **look))
    return extent, extent


def _size(axes: Axes, text: Any) -> tuple[float, float]:
    """Width and height of a text and the room around it, in inches."""
    figure: Any = axes.figure
    box = text.get_window_extent()
    return box.width / figure.dpi + 2 * PAD, box.height / figure.dpi + 2 * PAD


def _matrix(axes: Axes, node: Matrix, colour: str) -> tuple[NDArray[Any], NDArray[Any]]:
    shades = node.shades.clip(0, 1)
    rows, columns = shades.shape
    half = np.array([columns, rows]) * node.cell / 2
    left, bottom = np.array([node.x, node.y]) - half
    right, top = np.array([node.x, node.y]) + half
    for (row, column), shade in np.ndenumerate(shades):
        corner = (left + column * node.cell, top - (row + 1) * node.cell)
        look: dict[str, Any] = {"facecolor": (colour, 0.85 * shade), "edgecolor": colour, "linewidth": 0.6}
        axes.add_patch(Rectangle(corner, node.cell, node.cell, **look))
    extent = np.array([[left, right], [bottom, top]])
    room = extent.copy()
    if node.text:
        place = top + LIFT if node.above else bottom - LIFT
        text = axes.text(node.x, place, node.text, ha="center", va="bottom" if node.above else "top", zorder=3)
        width, height = np.array(_size(axes, text)) - 2 * PAD
        room[0] = min(left, node.x - width / 2), max(right, node.x + width / 2)
        room[1] = (bottom, place + height) if node.above else (place - height, top)
    return extent, room


def _group(axes: Axes, title: str, extents: NDArray[Any]) -> None:
    left, bottom = extents[:, :, 0].min(0) - 0.15
    right, top = extents[:, :, 1].max(0) + 0.15
    look: dict[str, Any] = {"facecolor": "none", "edgecolor": GREY, "linewidth": 1, "linestyle": (0, (4, 3))}
    axes.add_patch(Rectangle((left, bottom), right - left, top - bottom, zorder=0, **look))
    axes.text((left + right) / 2, top + 0.05, title, ha="center", va="bottom", size=10)


def _arrow(axes: Axes, arrow: Arrow, extents: Mapping[str, NDArray[Any]]) -> None:
    way = extents[arrow.end].mean(1) - extents[arrow.start].mean(1)
    tail = _edge(extents[arrow.start], way)
    head = _edge(extents[arrow.end], -way)
    look: dict[str, Any] = {"color": arrow.colour, "linewidth": 1.4, "linestyle": "--" if arrow.dashed else "-"}
    look["connectionstyle"] = f"arc3,rad={arrow.bend}"
    look["arrowstyle"] = "-|>,head_length=5,head_width=2.5"
    axes.add_patch(FancyArrowPatch(_pair(tail), _pair(head), shrinkA=1, shrinkB=1, **look))
    if arrow.text:
        along = head - tail
        across = np.array([along[1], -along[0]])  # to the right of the way
        if arrow.bend < 0 or (arrow.bend == 0 and across[1] < 0):
            across = -across  # on the outer side of a curve, above a straight line
        x, y = (tail + head) / 2 + abs(arrow.bend) * across / 2
        text = axes.text(x, y, arrow.text, ha="center", va="center", size=10)
        half = np.array(_size(axes, text)) / 2 - PAD
        away = across / max(float(np.hypot(*across)), 1e-9)
        text.set_position(_pair((x, y) + away * (LIFT + half @ np.abs(away))))


def _edge(extent: NDArray[Any], way: NDArray[Any]) -> NDArray[Any]:
    """Where a ray from the centre leaves the box."""
    half = (extent[:, 1] - extent[:, 0]) / 2
    step = float((half / np.maximum(np.abs(way), 1e-9)).min())
    return np.asarray(extent.mean(1) + way * step)


def _pair(point: NDArray[Any]) -> tuple[float, float]:
    return float(point[0]), float(point[1])
