"""Figures read on both pages and by every eye, refuse to be unlabelled, and come out the same twice."""

from __future__ import annotations

import io
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from peftref import plots
from peftref.results import judge

PAGES = ("#ffffff", "#121212", "#14181e")  # the light page, the theme's dark page, the dark page of its ancestor
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """The ratio of the web's accessibility guidelines (WCAG 2)."""
    dark, light = sorted(float(TO_XYZ[1] @ linear(c)) + 0.05 for c in (a, b))
    return light / dark


def lab(colour: str, sight: str) -> np.ndarray:
    x = TO_XYZ @ (np.array(SIGHT[sight]) @ linear(colour)).clip(0, 1) / (0.9505, 1, 1.089)
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


EDGES = torch.tensor([[0, 1], [1, 2]])
POINTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
MEAN = pd.DataFrame({"source": [3.0, 2.0], "LAME": [1.0, 2.0]}, index=["iid", "sorted"])
FIGURES = {
    "lines": lambda: plots.lines(range(4), {"source": torch.arange(4), "LAME": torch.eye(3, 4)}, "batch", "error (%)"),
    "bars": lambda: plots.bars(MEAN, MEAN / 10, xlabel="error (%)", ylabel="stream"),
    "images": lambda: plots.images(torch.rand(2, 3, 1, 4, 4, generator=torch.Generator()), "ab", "cde"),
    "curves": lambda: plots.curves(range(4), {"source": torch.eye(4), "LAME": torch.eye(3, 4)}, "batch", "error (%)"),
    "dots": lambda: plots.dots(
        {"source": [3.0, 2.0], "LAME": [1.0, -2.0], "Tent": [1.0, 4.0]},
        xlabel="error (%)",
        order="ascending",
        groups={"closed form": ["LAME"], "gradient": ["Tent"]},
        lines={"chance": 5.0},
        paper={"LAME": 0.5},
        digits=1,
    ),
    "diagram": lambda: plots.diagram(
        {"x": plots.Box(1, 1, "$x$", "data"), "W": plots.Matrix(3, 1, (2, 3), "$W$", "frozen")},
        [("x", "W", "now"), plots.Arrow("W", "x", "later", bend=0.3, dashed=True)],
        groups={"all": ["x", "W"]},
        height=2,
    ),
    "graph": lambda: plots.graph(POINTS, EDGES, {"before": [0, 0, 1], "after": [0, 1, 1]}, "xy", truth=[0, 1, 1]),
}


def test_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert min(contrast(plots.GREY, page) for page in PAGES) >= 4
    assert min(contrast(colour, page) for colour in plots.PALETTE for page in PAGES) >= 3


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_told_apart(sight: str) -> None:
    colours = (*plots.PALETTE, plots.GREY)
    assert min(np.linalg.norm(lab(a, sight) - lab(b, sight)) for a, b in combinations(colours, 2)) > 20


@pytest.mark.parametrize("name", FIGURES)
def test_same_bytes_and_nothing_global(name: str) -> None:
    before = dict(mpl.rcParams)
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert plots.png(figure) == plots.png(figure) == plots.png(FIGURES[name]())
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", FIGURES)
def test_transparent_and_all_text_grey(name: str) -> None:
    figure = FIGURES[name]()
    data, metadata = figure._repr_mimebundle_()
    picture = Image.open(io.BytesIO(plots.png(figure))).convert("RGBA")
    assert picture.getpixel((0, 0))[3] == 0
    assert metadata["image/png"]["width"] * 2 == pytest.approx(picture.width, abs=2)  # twice the page's resolution
    texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text()]
    assert texts and {mpl.colors.to_hex(text.get_color()) for text in texts} == {plots.GREY}
    assert min(text.get_size() for text in texts) >= 9


def test_mean_and_spread_over_seeds() -> None:
    y = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    axes = plots.lines([0, 1], {"a": y}, "t (s)", "y (m)").axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2, 4]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(4 + 8**0.5) and band[:, 1].min() == pytest.approx(2 - 2**0.5)


def test_mean_and_interval_over_seeds() -> None:
    y = [[1.0, 2.0], [3.0, 6.0]]
    axes = plots.curves([0, 1], {"a": y}, "t (s)", "y (m)").axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2, 4]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx(judge([2.0, 6.0])[1:3])


def test_seven_curves_have_a_look_of_their_own() -> None:
    axes = plots.lines([0, 1], {str(i): [0, i] for i in range(7)}, "t (s)", "y (m)").axes[0]
    drawn = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    assert len({line.get_color() for line in drawn}) == len({line._unscaled_dash_pattern[1] for line in drawn}) == 7


def test_names_at_the_ends_do_not_overlap() -> None:
    figure = plots.lines([0, 1], {f"curve {i}": [0, 1 + i / 1000] for i in range(6)}, "t (s)", "y (m)")
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 6 and boxes[-1].y0 < figure.axes[0].get_window_extent().y1
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:], strict=False))


def shown(figure: Figure, way: str) -> list:
    """The labels of an axis that are drawn within it, where they lie on the page, in order."""
    figure.draw_without_rendering()
    axis, page = getattr(figure.axes[0], way), getattr(figure.axes[0], f"get_{way[0]}lim")()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    labels = [tick.label1 for tick in ticks if tick.label1.get_text() and page[0] <= tick.get_loc() <= page[1]]
    return sorted((label.get_window_extent() for label in labels), key=lambda box: (box.x0, box.y0))


@pytest.mark.parametrize("top", [0.05, 0.1, 0.3, 0.9, 1.1, 9, 90, 1e6])
def test_numbers_of_a_logarithmic_axis_can_be_read(top: float) -> None:
    x = torch.tensor([0.01, top])
    figure = plots.lines(x, {"a": x}, "rate", "y (m)", xscale="log", yscale="log")
    across, up = shown(figure, "xaxis"), shown(figure, "yaxis")
    assert min(len(across), len(up)) >= 2
    assert all(left.x1 < right.x0 for left, right in zip(across, across[1:], strict=False))
    assert all(low.y1 < high.y0 for low, high in zip(up, up[1:], strict=False))


def test_regions_are_named_once_and_may_be_silent() -> None:
    figure = plots.lines([0, 9], {"a": [1, 2]}, "t (s)", "y (m)", regions=[(0, 4, "fog"), (4, 9, "")])
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()] == ["fog", "a"]
    assert len(figure.axes[0].patches) == 2


def test_source_is_grey_and_does_not_use_up_a_colour() -> None:
    axes = plots.lines([0, 1], {"source": [1, 2], "LAME": [1, 3]}, "t (s)", "y (m)").axes[0]
    assert [line.get_color() for line in axes.lines[:2]] == [plots.GREY, plots.PALETTE[0]]


def test_wrong_nodes_are_ringed() -> None:
    before, after = FIGURES["graph"]().axes
    rings = [next(line for line in axes.lines if line.get_label() == "wrong") for axes in (before, after)]
    assert [ring.get_xydata().tolist() for ring in rings] == [[[1.0, 0.0]], []]


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("xlabel", lambda: plots.lines([0], {"a": [1]}, "", "y (m)")),
        ("ylabel", lambda: plots.lines([0], {"a": [1]}, "t (s)", " ")),
        ("ys", lambda: plots.lines([0, 1], {"a": [1]}, "t (s)", "y (m)")),
        ("ys", lambda: plots.lines([0], {}, "t (s)", "y (m)")),
        ("xlabel", lambda: plots.bars(MEAN, xlabel="", ylabel="stream")),
        ("ylabel", lambda: plots.bars(MEAN, xlabel="error (%)", ylabel="")),
        ("mean", lambda: plots.bars(MEAN.iloc[:0], xlabel="error (%)", ylabel="stream")),
        ("spread", lambda: plots.bars(MEAN, MEAN.T, xlabel="error (%)", ylabel="stream")),
        ("xlabel", lambda: plots.curves([0], {"a": [[1], [2]]}, "", "y (m)")),
        ("ys", lambda: plots.curves([0], {}, "t (s)", "y (m)")),
        ("ys", lambda: plots.curves([0, 1], {"a": [1, 2]}, "t (s)", "y (m)")),
        ("ys", lambda: plots.curves([0, 1], {"a": [[1, 2]]}, "t (s)", "y (m)")),
        ("ys", lambda: plots.curves([0, 1], {"a": [[1], [2]]}, "t (s)", "y (m)")),
        ("ys", lambda: plots.curves([0], {str(i): [[1], [2]] for i in range(8)}, "t (s)", "y (m)")),
        ("labels", lambda: plots.images(torch.zeros(1, 2, 4, 4), ["a"], ["b"])),
        ("panels", lambda: plots.graph(POINTS, EDGES, {"": [0, 0, 0]}, "x")),
        ("panels", lambda: plots.graph(POINTS, EDGES, {"a": [0, 0]}, "x")),
        ("panels", lambda: plots.graph(POINTS, EDGES, {"a": [0, 0, 1]}, "x")),
        ("panels", lambda: plots.graph(POINTS, EDGES, {}, "x")),
    ],
)
def test_refused(match: str, call) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=match):
        call()


def test_a_curve_that_ends_early_is_led_to_its_name() -> None:
    figure = plots.lines(
        [0, 1, 2, 4], {"short": [1.0, 2.0, np.nan, np.nan], "long": [0.0, 1.0, 2.0, 4.0]}, "x", "y (%)"
    )
    axes = figure.axes[0]
    to_data = axes.transAxes + axes.transData.inverted()
    leaders = [line for line in axes.lines if line.get_transform() == axes.transAxes]
    starts = {line.get_linestyle(): to_data.transform(line.get_xydata()[0]) for line in leaders}
    np.testing.assert_allclose(starts[":"], [1, 2], atol=1e-6)
    np.testing.assert_allclose(starts["-"], [4, 4], atol=1e-6)
