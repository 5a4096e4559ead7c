"""Cost against gain: the points are where they should be, and every name can be read."""

from __future__ import annotations

import re

import numpy as np
import pytest

from peftref import plots
from peftref.plots.house import MARKERS
from peftref.plots.tradeoffs import tradeoff

POINTS = {
    "one": (10, 70.0, 1.0),
    "two": (1000, 70.5, 2.0),
    "three": (1000, 70.4, 0.5),
    "source model": (1e5, 50.0, 0.1),
}


def test_points_bars_and_names() -> None:
    figure = tradeoff(POINTS, xlabel="numbers", ylabel="accuracy (%)", lines={"head only": 60.0})
    axes = figure.axes[0]
    drawn = [line for line in axes.lines if line.get_marker() in MARKERS]
    assert np.allclose([line.get_xydata()[0] for line in drawn], [p[:2] for p in POINTS.values()])
    assert len({line.get_marker() for line in drawn}) == len({line.get_color() for line in drawn}) == 4
    assert drawn[-1].get_color() == plots.GREY  # a source does nothing
    ends = [segments.get_segments()[0][:, 1] for segments in axes.collections]
    assert np.allclose(ends, [(y - s, y + s) for _, y, s in POINTS.values()])
    assert [text.get_text() for text in axes.texts] == ["head only"]
    assert axes.get_xscale() == "log" and (axes.get_xlabel(), axes.get_ylabel()) == ("numbers", "accuracy (%)")


def test_every_mark_has_its_name() -> None:
    figure = tradeoff(POINTS, xlabel="numbers", ylabel="accuracy (%)")
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == list(POINTS)
    drawn = [line for line in figure.axes[0].lines if line.get_marker() in MARKERS]
    assert [h.get_marker() for h in legend.legend_handles] == [line.get_marker() for line in drawn]
    assert {h.get_linestyle() for h in legend.legend_handles} == {"None"}  # a point is no curve
    assert plots.png(figure) == plots.png(tradeoff(POINTS, xlabel="numbers", ylabel="accuracy (%)"))


@pytest.mark.parametrize("most", [400, 3000, 20_000, 40_000, 1e6])
def test_costs_can_be_read(most: float) -> None:
    figure = tradeoff({"a": (300, 1, 1), "b": (most, 2, 1)}, xlabel="numbers", ylabel="y")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (low, high), ticks = axes.get_xlim(), [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
    labels = [tick.label1 for tick in ticks if tick.label1.get_text() and low <= tick.get_loc() <= high]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert labels and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("points", {"points": {}}), ("points", {"points": {"a": (0, 1, 1)}}),
        ("points", {"points": {"a": (1, 2, np.nan)}}),
        ("xlabel", {"xlabel": ""}), ("ylabel", {"ylabel": " "}),
    ],
)  # fmt: skip
def test_bad_input(name: str, call: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: expected"):
        tradeoff(**{"points": POINTS, "xlabel": "numbers", "ylabel": "accuracy (%)"} | call)
    assert tradeoff({"a": (0, 1, 1)}, xlabel="x", ylabel="y", xscale="linear").axes
