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


def rows(figure: plots.Plot) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_order_of_the_rows() -> None:
    values = {"b": [2.0, 2.1], "c": [3.0, 3.1], "a": [1.0, 1.1]}
    assert rows(plots.dots(values, xlabel="x")) == ["b", "c", "a"]
    assert rows(plots.dots(values, xlabel="x", order="descending")) == ["c", "b", "a"]
    figure = plots.dots(values, xlabel="x", order="ascending", paper={"c": 3.3}, digits=2)
    assert rows(figure) == ["a", "b", "c"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.05", "2.05", "3.05"]
    diamond = next(line for line in figure.axes[0].lines if line.get_marker() == "D")
    assert diamond.get_xydata().tolist() == [[3.3, 2]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["the paper's"]


def test_colours_mean_something() -> None:
    values = {"source": [2.0, 2.1], "LAME": [3.0, 3.1], "Tent": [1.0, 1.1], "BN": [1.0, 1.1]}
    figure = plots.dots(values, xlabel="x", groups={"closed form": ["LAME"], "gradient": ["Tent"]})
    colours = [line.get_color() for line in figure.axes[0].lines[::3]]
    assert colours == [plots.GREY, plots.PALETTE[0], plots.PALETTE[1], plots.GREY]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["closed form", "gradient"]
    plain = plots.dots(values, xlabel="x")
    assert [line.get_color() for line in plain.axes[0].lines[::3]] == [plots.GREY, *[plots.PALETTE[0]] * 3]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("xlabel", {"xlabel": " "}),
        ("order", {"order": "up"}),
        ("groups", {"groups": {"a": ["nothing"]}}),
        ("groups", {"groups": {"a": ["LoRA"], "b": ["LoRA"]}}),
        ("groups", {"groups": {str(i): [] for i in range(8)}}),
        ("paper", {"paper": {"nothing": 1.0}}),
        ("paper", {"panels": {"one": VALUES, "two": VALUES}, "paper": {"LoRA": 1.0}}),
        ("values", {"panels": {"LoRA": [1.0, float("nan")]}}),
    ],
)
def test_refused(name: str, wrong: dict) -> None:
    given = {"panels": VALUES, "xlabel": "accuracy (%)"} | wrong
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        plots.dots(**given)


@pytest.mark.parametrize("panels", [{}, {"one": {}}, {"one": VALUES, "other": {"LoRA": [1.0, 2.0]}}])
def test_dots_want_the_same_methods_in_every_panel(panels: dict) -> None:
    with pytest.raises(ValueError, match="panels: expected the same methods in each"):
        plots.dots(panels, xlabel="accuracy (%)")


def test_dots_want_more_than_one_seed() -> None:
    with pytest.raises(ValueError, match="values: expected two or more finite numbers"):
        plots.dots({"one": {"LoRA": [1.0]}}, xlabel="accuracy (%)")
