"""Seeds as dots: what is drawn, and what is refused."""

from __future__ import annotations

import pytest

from peftref import plots
from peftref.results import judge

VALUES = {"LoRA": [72.0, 74.0, 73.0], "Bone": [70.0, 73.0, 69.0]}


def test_dots_show_every_seed_its_mean_and_its_interval() -> None:
    figure = plots.dots(
        {"one": VALUES, "other": VALUES}, xlabel="accuracy (%)", highlight=["Bone"], lines={"all": 76.0}
    )
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("one", "other")
    interval, seeds, mean = first.lines[:3]
    found = judge(VALUES["LoRA"])
    assert list(interval.get_xdata()) == [found.low, found.high]
    assert list(seeds.get_xdata()) == VALUES["LoRA"] and list(mean.get_xdata()) == [found.mean]
    assert first.lines[3].get_color() == plots.PALETTE[1] != interval.get_color()
    assert first.get_ylim()[0] > first.get_ylim()[1]  # the first name at the top
    assert list(first.lines[-1].get_xdata()) == [76.0, 76.0]


@pytest.mark.parametrize("panels", [{}, {"one": {}}, {"one": VALUES, "other": {"LoRA": [1.0, 2.0]}}])
def test_dots_want_the_same_methods_in_every_panel(panels: dict) -> None:
    with pytest.raises(ValueError, match="panels: expected the same methods in each"):
        plots.dots(panels, xlabel="accuracy (%)")


def test_dots_want_more_than_one_seed() -> None:
    with pytest.raises(ValueError, match="values: expected two or more finite numbers"):
        plots.dots({"one": {"LoRA": [1.0]}}, xlabel="accuracy (%)")
