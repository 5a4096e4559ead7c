"""Small multiples: what is drawn is what was given."""

from __future__ import annotations

import re

import numpy as np
import pytest

from peftref import plots
from peftref.plots import facets


def cases(n: int = 4) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {f"case {i}": {"first": rng.normal(i, 1, 50), "second": rng.normal(size=30)} for i in range(n)}


def test_boxes_show_the_quartiles_of_each_method() -> None:
    given = cases()
    figure = facets.boxes(given, xlabel="estimate", truth=0.5)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(given)
    for axes, methods in zip(shown, given.values(), strict=True):
        boxes = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 5]
        for box, values in zip(boxes, methods.values(), strict=True):
            assert np.allclose([min(box), max(box)], np.quantile(values, (0.25, 0.75)))
        assert any(np.allclose(line.get_xdata(), 0.5) for line in axes.lines)
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["first", "second"]
    low, high = shown[0].get_ylim()
    assert low > high  # the first method stands at the top


def test_values_outside_the_range_stay_in_sight() -> None:
    figure = facets.boxes({"a": {"m": [0.0, 0.1, 0.2, 0.3, 9.0]}}, xlabel="estimate", xlim=(-1.0, 1.0), columns=1)
    fliers = np.concatenate([line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "."])
    assert fliers.tolist() == [1.0]


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 3), (4, 2), (5, 3), (7, 3)])
def test_every_column_has_its_numbers(n: int, columns: int) -> None:
    cloud = {name: (np.arange(3.0), np.arange(3.0)) for name in cases(n)}
    for figure in (
        facets.boxes(cases(n), xlabel="x", columns=columns),
        facets.scatter(cloud, xlabel="x", ylabel="y", columns=columns),
    ):
        figure.draw_without_rendering()
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert len(shown) == n
        numbered = [any(t.label1.get_visible() for t in axes.xaxis.get_major_ticks()) for axes in shown]
        assert numbered == [i + columns >= n for i in range(n)]  # those with nothing below, and no others


def test_scatter_draws_points_and_lines() -> None:
    x = np.linspace(-2, 2, 9)
    figure = facets.scatter({"a": (x, 3 * x)}, xlabel="v", ylabel="u", slopes={"a": 3.0}, truth=1.0, columns=1)
    points, right, fitted = figure.axes[0].lines
    assert np.allclose(points.get_ydata(), 3 * x)
    assert np.allclose(right.get_ydata() / right.get_xdata(), 1) and right.get_color() == plots.GREY
    assert np.allclose(fitted.get_ydata() / fitted.get_xdata(), 3)
    assert figure.axes[0].get_title() == "a: slope 3.00"


def test_the_same_figure_gives_the_same_bytes_and_leaves_matplotlib_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    made = [plots.png(facets.boxes(cases(2), xlabel="estimate")) for _ in range(2)]
    assert made[0] == made[1] and dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("xlabel", lambda: facets.boxes(cases(), xlabel=" ")),
        ("panels", lambda: facets.boxes({}, xlabel="x")),
        ("panels", lambda: facets.boxes({"a": {"m": [1.0]}, "b": {"n": [1.0]}}, xlabel="x")),
        ("panels", lambda: facets.boxes({"a": {"m": []}}, xlabel="x")),
        ("panels[0]", lambda: facets.boxes({"": {"m": [1.0]}}, xlabel="x")),
        ("ylabel", lambda: facets.scatter({"a": ([1.0], [1.0])}, xlabel="x", ylabel="")),
        ("panels", lambda: facets.scatter({}, xlabel="x", ylabel="y")),
        ("panels", lambda: facets.scatter({"a": ([1.0, 2.0], [1.0])}, xlabel="x", ylabel="y")),
    ],
)
def test_bad_input(name: str, draw) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: expected"):
        draw()


def test_boxes_of_a_group_share_a_colour() -> None:
    given = {"a": {"fails": [1.0, 2.0], "works": [1.0, 1.1], "too": [1.0, 1.2], "none": [1.0, 1.3]}}
    figure = facets.boxes(given, xlabel="estimate", columns=1, groups={"biased": ["fails"], "right": ["works", "too"]})
    boxes = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 5]
    found = [line.get_color() for line in boxes]
    assert found[1] == found[2] != found[0] and found[3] == facets.GREY
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["biased", "right"]
    with pytest.raises(ValueError, match="groups: expected"):
        facets.boxes(given, xlabel="estimate", groups={"right": ["nobody"]})
