"""Schematics: arrows end at the edges of what they join, names stay in the frame, colours are explained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle

from peftref import plots
from peftref.plots import Arrow, Box, Matrix, diagram

NODES = {
    "x": Box(0.5, 1.0, "x", "data"),
    "W": Matrix(2.0, 1.0, (4, 6), "W", "frozen"),
    "+": Box(3.5, 1.0, "+", "operation"),
}


def patches(figure: plots.Plot, kind: type) -> list[Any]:
    return [patch for patch in figure.axes[0].patches if type(patch) is kind]


def test_cells_are_shaded_from_the_top_left() -> None:
    shades = np.array([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    cells = patches(diagram({"A": Matrix(2.0, 1.0, shades, cell=0.2, kind="trained")}), Rectangle)
    assert (
        len(cells) == 6
        and cells[0].get_xy() == pytest.approx((1.7, 1.0))
        and cells[5].get_xy()[1] == pytest.approx(0.8)
    )
    assert [round(cell.get_facecolor()[3], 3) for cell in cells] == [0.85, 0, 0.425, 0, 0, 0]


def test_arrows_join_edges() -> None:
    figure = diagram(NODES, [("x", "W"), ("W", "+", "sum")])
    first, second = patches(figure, FancyArrowPatch)
    (circle,) = patches(figure, Ellipse)
    assert first._posA_posB[1] == pytest.approx((2.0 - 3 * 0.12, 1.0))
    assert second._posA_posB[0] == pytest.approx((2.0 + 3 * 0.12, 1.0))
    assert second._posA_posB[1][0] == pytest.approx(3.5 - circle.width / 2)
    assert "sum" in [text.get_text() for text in figure.axes[0].texts]


def test_a_box_holds_its_text() -> None:
    figure = diagram(
        {"a": Box(2.5, 1.0, "two lines\nof some length", "trained"), "b": Box(1.0, 0.5, "b", size=(1.0, 0.4))}
    )
    fitted, given = patches(figure, FancyBboxPatch)
    box = figure.axes[0].texts[0].get_window_extent()
    assert fitted.get_width() > box.width / figure.dpi and fitted.get_height() > box.height / figure.dpi
    assert (given.get_width(), given.get_height()) == (1.0, 0.4)


def test_a_frame_holds_names_too() -> None:
    figure = diagram(NODES | {"A": Matrix(4.3, 1.0, (2, 2), "a name")}, groups={"both": ["W", "A"]})
    frame = patches(figure, Rectangle)[-1]
    to_inches = figure.axes[0].transData.inverted()
    for text in figure.axes[0].texts:
        if text.get_text() in ("W", "a name"):
            low, high = to_inches.transform(text.get_window_extent())
            assert (low > frame.get_xy()).all() and high[0] < frame.get_xy()[0] + frame.get_width()


def test_the_legend_explains_the_colours_that_are_there() -> None:
    assert not diagram({"x": Box(1, 1, "x")}).legends
    two = {
        "a": Box(1, 1, "a", "computed"),
        "b": Box(3, 1, "b", "trained"),
        "c": Box(4, 1, "c", "frozen", colour=plots.PALETTE[1]),
    }
    assert [text.get_text() for text in diagram(two).legends[0].get_texts()] == ["trained", "computed"]
    assert diagram(two, height=2.0).get_figheight() > diagram({"x": Box(1, 1, "x")}, height=2.0).get_figheight() == 2.0


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("nodes", lambda: diagram({})),
        ("nodes", lambda: diagram({"a": Box(1, 1, "a", "cold")})),
        ("nodes", lambda: diagram({"a": Box(6, 1, "a")})),
        ("nodes", lambda: diagram({"a": Box(1, 0, "a")})),
        ("nodes", lambda: diagram({"a": Matrix(1, 1, [1.0, 2.0])})),
        ("nodes", lambda: diagram({"a": Matrix(1, 1, np.ones((0, 2)))})),
        ("arrows", lambda: diagram(NODES, [("x", "y")])),
        ("arrows", lambda: diagram(NODES, [Arrow("y", "x")])),
        ("groups", lambda: diagram(NODES, groups={"a": ["y"]})),
    ],
)
def test_refused(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
