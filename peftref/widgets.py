"""Live figures for a page with no Python behind it.

:func:`explore` draws every picture of a grid beforehand, puts them in nested ``ipywidgets.Stack`` boxes (one level per
control) and links each control to its boxes *in the browser*. Moving a control then only changes which picture shows,
in a notebook and in the published page alike. Before the page's scripts have run, and for readers without them, the
starting picture stands there as an ordinary image.

>>> from peftref import plots
>>> def draw(k, kind):
...     return plots.lines([0, 1], {kind: [k, 2 * k]}, "t (s)", "y (m)")
>>> play = explore(draw, alt="A line", labels={"k": "slope (m/s)", "kind": "kind"}, k=[1, 2, 3], kind=["up", "on"])
>>> len(play.frames), play.frames[3, "up"][:29]
(6, '<img alt="A line; slope (m/s)')
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product
from typing import Any

import ipywidgets
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image

from peftref.plots.house import PIXELS, png

__all__ = ["BUDGET", "Explorer", "explore"]

BUDGET = 3_000_000  # bytes of pictures in one widget: what a phone still loads in seconds
# Shown until a widget has been drawn in the same cell; so a picture is never there twice, nor ever missing.
HIDE = (
    "<style>:is(.cell_output, .jp-OutputArea, .jp-Cell-outputArea, #output-area):has(.jupyter-widgets) "
    ".explore-start {display: none}</style>"
)


@dataclass(frozen=True)
class Explorer:
    """What :func:`explore` returns; displays itself as the last expression of a cell.

    Attributes:
        widget: the controls above the picture.
        frames: point of the grid -> the HTML shown there.
        start: the static figure for readers without scripts.
    """

    widget: ipywidgets.VBox
    frames: Mapping[tuple[Hashable, ...], str] = field(repr=False)
    start: str = field(repr=False)

    def _ipython_display_(self) -> None:
        display(HTML(HIDE + f'<div class="explore-start">{self.start}</div>'), self.widget)


def explore(
    fn: Callable[..., Figure | str],
    *,
    alt: str | Callable[..., str],
    labels: Mapping[str, str],
    start: Mapping[str, Any] | None = None,
    **grid: Sequence[Any],
) -> Explorer:
    """A figure whose parameters the reader moves.

    Args:
        fn: called once with each point of the grid, by keyword; returns a figure, or HTML (its images with alt text).
        alt: what the picture shows: a sentence, to which the values are added, or a function of the point.
        labels: parameter -> label of its control, with unit.
        start: parameter -> value shown first; by default the first one.
        grid: parameter -> its values. Numbers get a slider, anything else a menu; the first one is on top.

    Raises:
        ValueError: an empty grid, a control without label, a start outside the grid, or pictures above ``BUDGET``.
    """
    if not grid or any(len(values) < 2 or len(set(values)) < len(values) for values in grid.values()):
        raise ValueError(f"grid: expected parameters with two or more different values each, got {grid}")
    if missing := [name for name in grid if not labels.get(name, "").strip()]:
        raise ValueError(f"labels: expected a label with unit for each of {[*grid]}, got none for {missing}")
    first = {name: values[0] for name, values in grid.items()} | dict(start or {})
    if unknown := {name: value for name, value in first.items() if value not in grid.get(name, ())}:
        raise ValueError(f"start: expected values of the grid {grid}, got {unknown}")

    frames = {}
    size = 0
    for values in product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        words = ", ".join(f"{labels[name]} = {value}" for name, value in point.items())
        frames[values] = _html(fn(**point), alt(**point) if callable(alt) else f"{alt}; {words}")
        if (size := size + len(frames[values])) > BUDGET:
            raise ValueError(f"grid: expected pictures of at most {BUDGET} bytes in all, got {size}")

    controls = {name: _control(values, labels[name], first[name]) for name, values in grid.items()}
    picture = (_stacked if hasattr(ipywidgets, "Stack") else _observed)(frames, list(controls.values()))
    widget = ipywidgets.VBox([*controls.values(), picture])
    return Explorer(widget, frames, frames[tuple(first[name] for name in grid)])


def _html(shown: Figure | str, alt: str) -> str:
    """A figure as a lossless WebP (a third smaller than PNG) inside an image element with alt text."""
    if isinstance(shown, str):
        return shown
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(shown))).save(buffer, format="webp", lossless=True, exact=True)
    width = round(shown.get_figwidth() * PIXELS)
    data = b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{escape(alt)}" class="dark-light" width="{width}" style="max-width: 100%; height: auto" '
        f'src="data:image/webp;base64,{data}">'
    )


def _control(values: Sequence[Any], label: str, value: Any) -> ipywidgets.Widget:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    kind = ipywidgets.SelectionSlider if numbers else ipywidgets.Dropdown
    options = [(f"{v:g}" if numbers else str(v), v) for v in values]
    layout = ipywidgets.Layout(width="30em", max_width="100%")
    # The label gets the room it needs, and no more; the default cuts it off after some ten letters.
    return kind(options=options, value=value, description=label, layout=layout, style={"description_width": "initial"})


def _stacked(frames: Mapping[tuple[Hashable, ...], str], controls: list[ipywidgets.Widget]) -> ipywidgets.Widget:
    """One Stack per value of the outer controls, each linked to its level's control in the browser."""
    layout = ipywidgets.Layout(width="auto")  # one model shared by all the pictures
    style = ipywidgets.HTML().style
    level = [ipywidgets.HTML(frame, layout=layout, style=style) for frame in frames.values()]
    for control in reversed(controls):  # from the innermost control, whose values vary fastest, outwards
        size = len(control.options)
        children = [level[i : i + size] for i in range(0, len(level), size)]
        level = [ipywidgets.Stack(some, selected_index=control.index, layout=layout) for some in children]
        for stack in level:
            ipywidgets.jslink((control, "index"), (stack, "selected_index"))
    return level[0]


def _observed(frames: Mapping[tuple[Hashable, ...], str], controls: list[ipywidgets.Widget]) -> ipywidgets.Widget:
    """For ipywidgets 7 (Colab), which has no Stack: there a kernel is alive, and Python changes the picture."""
    picture = ipywidgets.HTML()

    def show(_: Any = None) -> None:
        picture.value = frames[tuple(control.value for control in controls)]

    for control in controls:
        control.observe(show, "value")
    show()
    return picture
