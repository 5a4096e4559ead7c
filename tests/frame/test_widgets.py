"""A live figure holds every picture of its grid, linked in the browser; see test_browser for the moving."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import ipywidgets
import pytest
from matplotlib.figure import Figure

from peftref import plots, widgets

GRID: dict[str, list[Any]] = {"kind": ["up", "down"], "k": [1, 2, 3], "rate": [0.1, 1.0]}
LABELS = {"kind": "direction", "k": "slope (m/s)", "rate": "rate (1/s)"}


def draw(kind: str, k: int, rate: float) -> Figure:
    return plots.lines([0, 1], {kind: [0, k * rate]}, "t (s)", "y (m)")


def words(**point: Any) -> str:
    return "<p>" + " ".join(map(str, point.values())) + "</p>"


def children(widget: ipywidgets.Widget, kind: type) -> list[ipywidgets.Widget]:
    found = [widget] if isinstance(widget, kind) else []
    return found + [hit for child in getattr(widget, "children", ()) for hit in children(child, kind)]


@pytest.fixture
def play() -> widgets.Explorer:
    return widgets.explore(words, alt="words", labels=LABELS, start={"k": 2, "rate": 1.0}, **GRID)


def links() -> set[tuple[str, str, str, str]]:
    """What the browser is told to keep equal: (control, its trait, box, its trait), as the links' own state says."""
    state = ipywidgets.Widget.get_manager_state()["state"].values()
    found = [model["state"] for model in state if model["model_name"] == "LinkModel"]
    return {(*link["source"], *link["target"]) for link in found}


def follow(play: widgets.Explorer, index: tuple[int, ...]) -> str:
    """The picture shown when the controls stand at ``index``: what the browser does, through the links."""
    controls, box = play.widget.children[:-1], play.widget.children[-1]
    linked = links()
    for control, i in zip(controls, index, strict=True):
        name = "IPY_MODEL_" + control.model_id
        assert (name, "index", "IPY_MODEL_" + box.model_id, "selected_index") in linked
        box = box.children[i]
    return box.value


def test_every_point_of_the_grid_is_reached_through_the_links(play: widgets.Explorer) -> None:
    for index in product(*(range(len(values)) for values in GRID.values())):
        values = tuple(v[i] for v, i in zip(GRID.values(), index, strict=True))
        assert follow(play, index) == play.frames[values] == words(**dict(zip(GRID, values, strict=True)))


def test_controls_are_labelled_and_fit_their_values(play: widgets.Explorer) -> None:
    *controls, _ = play.widget.children
    assert [type(c) for c in controls] == [ipywidgets.Dropdown, ipywidgets.SelectionSlider, ipywidgets.SelectionSlider]
    assert [c.description for c in controls] == list(LABELS.values())


def test_start(play: widgets.Explorer) -> None:
    *controls, box = play.widget.children
    assert [c.value for c in controls] == ["up", 2, 1.0]
    assert all(stack.selected_index in (0, 1) for stack in children(box, ipywidgets.Stack))
    assert play.start == play.frames["up", 2, 1.0] == follow(play, tuple(c.index for c in controls))


def test_pictures_differ_and_say_what_they_show() -> None:
    play = widgets.explore(draw, alt="A line <steep>", labels=LABELS, **GRID)
    pictures = {re.search(r'src="data:image/webp;base64,([^"]+)"', frame)[1] for frame in play.frames.values()}
    assert len(pictures) == len(play.frames)
    first = play.frames["up", 1, 0.1]
    assert 'alt="A line &lt;steep&gt;; direction = up, slope (m/s) = 1, rate (1/s) = 0.1"' in first


def test_alt_may_be_a_function_of_the_point() -> None:
    grid = {"k": [1, 2]}
    twice = [
        widgets.explore(lambda k: draw("up", k, 1.0), alt=lambda k: f"up by {k}", labels=LABELS, **grid) for _ in "ab"
    ]
    assert 'alt="up by 2"' in twice[0].frames[2,]
    assert twice[0].frames == twice[1].frames  # to the byte


def test_displays_the_static_figure_then_the_widget(play: widgets.Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "display", lambda *things: shown.extend(things))
    play._ipython_display_()
    static, live = shown
    assert play.start in static.data and "explore-start" in static.data and live is play.widget


def test_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(widgets, "BUDGET", 30)

    def large(**point: Any) -> str:
        calls.append(point)
        return "<p>" + "x" * 20 + "</p>"

    with pytest.raises(ValueError, match="at most 30 bytes"):
        widgets.explore(large, alt="x", labels=LABELS, **GRID)
    assert len(calls) == 2  # stops at the picture that is too much


def test_without_stack_python_changes_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ipywidgets, "Stack")  # ipywidgets 7
    play = widgets.explore(words, alt="x", labels=LABELS, start={"k": 3}, **GRID)
    kind, k, rate, picture = play.widget.children
    assert picture.value == words(kind="up", k=3, rate=0.1)
    kind.value, rate.index = "down", 1
    assert picture.value == words(kind="down", k=3, rate=1.0)


@pytest.mark.parametrize(
    ("match", "wrong"),
    [
        ("grid", {"k": [1]}),
        ("grid", {"k": [1, 1]}),
        ("labels", {"k": [1, 2], "unlabelled": [1, 2]}),
        ("start", {"k": [1, 2], "start": {"k": 3}}),
        ("start", {"k": [1, 2], "start": {"other": 1}}),
        ("grid", {}),
    ],
)
def test_refused(match: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        widgets.explore(words, alt="x", labels=LABELS, **wrong)
