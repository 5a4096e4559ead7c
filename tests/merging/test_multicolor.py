"""MultiColorMNIST: painted as by the loop, with the frequencies of its law, from a seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from peftref.data import load
from peftref.merging.experiments.multicolor import COLOURS, colour_maps, multicolor
from tests._naive.multicolor import RGB, loop_paint


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blank(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, 1, 14, 14), torch.randint(10, (n,), generator=generator(seed))


@pytest.mark.parametrize("colours", [1, 32])
@pytest.mark.parametrize("p", [0.0, 0.7, 1.0])
def test_painted_as_by_the_loop(colours, p):
    digits = load("mnist5k").test
    made = multicolor(digits.x[:40], digits.y[:40], p, generator=generator(), colours=colours)
    expected = loop_paint(digits.x[:40, 0].numpy(), made.shown.numpy(), made.maps.numpy())
    assert made.x.shape == (40, 3, 42, 42) and made.x.dtype == torch.float32
    assert torch.equal(made.x, torch.from_numpy(expected))
    assert torch.equal(made.y, digits.y[:40]) and made.x.min() >= 0 and made.x.max() <= 1


def test_ten_colours():
    assert list(COLOURS.values()) == RGB and len(set(RGB)) == 10


@pytest.mark.parametrize("colours", [1, 32])
def test_frequencies(colours):
    """A patch shows its class with probability 1 - p + p/10, each other with p/10, whatever its neighbours do."""
    n, p = 20_000, 0.7
    x, y = blank(n)
    made = multicolor(x, y, p, generator=generator(), colours=colours)
    turn = (made.shown - y[:, None]) % 10  # 0: the own class
    law = torch.tensor([1 - p + p / 10, *[p / 10] * 9], dtype=torch.double)
    independent = n * colours
    share = turn[:, :colours].flatten().bincount(minlength=10) / independent
    assert ((share - law).abs() < 4 * (law * (1 - law) / independent).sqrt()).all()
    each = (turn == 0).double().mean(0)
    assert ((each - law[0]).abs() < 5 * (law[0] * (1 - law[0]) / n).sqrt()).all()
    kept = (turn == 0).double()
    correlation = np.corrcoef(kept.T.numpy())[np.triu_indices(32, 1)]
    if colours == 1:
        assert (made.shown == made.shown[:, :1]).all() and (correlation > 0.999).all()
    else:
        assert np.abs(correlation).max() < 5 / math.sqrt(n)


def test_which_classes_are_shown_does_not_depend_on_the_right_one_when_all_are_drawn_anew():
    x, y = blank(20_000)
    made = multicolor(x, y, 1.0, generator=generator())
    table = torch.zeros(10, 10, dtype=torch.long).index_put_(
        (y.repeat_interleave(32), made.shown.flatten()), torch.tensor(1), accumulate=True
    )
    chi2 = ((table - table.sum(1, keepdim=True) / 10) ** 2 / (table.sum(1, keepdim=True) / 10)).sum()
    assert chi2 < 153  # 90 degrees of freedom, 99.996 %


def test_maps():
    maps = colour_maps(generator())
    assert torch.equal(maps.sort(-1).values, torch.arange(10).expand(32, 10))
    assert len({tuple(row) for row in maps.tolist()}) == 32
    one = colour_maps(generator(), 1)
    assert (one == one[0]).all() and torch.equal(one[0].sort().values, torch.arange(10))
    first = torch.stack([colour_maps(generator(s), 1)[0] for s in range(3000)])
    counts = torch.stack([column.bincount(minlength=10) for column in first.T])
    assert (counts - 300).abs().max() < 5 * math.sqrt(3000 * 0.09)  # each colour as often for each class


def test_train_and_test_share_their_maps():
    x, y = blank(30)
    train = multicolor(x, y, 0.0, generator=generator(1))
    test = multicolor(x, y, 0.0, generator=generator(2), maps=train.maps)
    assert torch.equal(train.x, test.x)
    assert not torch.equal(train.x, multicolor(x, y, 0.0, generator=generator(2)).x)


def test_seeds():
    x, y = blank(30)
    a, b, c = (multicolor(x, y, 0.8, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(a.x, b.x) and not torch.equal(a.shown, c.shown) and not torch.equal(a.maps, c.maps)


@pytest.mark.parametrize(("side", "exact"), [(28, True), (14, True), (8, False)])
def test_digits_of_any_size(side, exact):
    x = torch.rand(5, 1, side, side, generator=generator())
    digit = multicolor(x, torch.arange(5), 0.5, generator=generator()).x[:, :, 14:28, 14:28]
    assert (digit == digit[:, :1]).all()
    if exact:
        assert torch.equal(digit[:, :1], x[..., :: side // 14, :: side // 14])
    else:
        assert_close(digit.mean(), x.mean(), atol=0.03, rtol=0)


def test_inputs_are_left_alone_and_results_own_their_memory():
    x, y = blank(4)
    maps = colour_maps(generator())
    before = x.clone(), y.clone(), maps.clone()
    made = multicolor(x, y, 0.5, generator=generator(), maps=maps)
    for t in (made.x, made.shown, made.maps):
        t.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, maps), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 1, 14, 14, dtype=torch.uint8)}, TypeError, "x: expected a floating-point"),
        ({"x": torch.full((4, 1, 14, 14), 255.0)}, ValueError, r"x: expected values in \[0, 1\]"),
        ({"x": torch.zeros(4, 3, 14, 14)}, ValueError, "x, y: expected shapes"),
        ({"y": torch.zeros(3, dtype=torch.long)}, ValueError, "x, y: expected shapes"),
        ({"y": torch.zeros(4)}, TypeError, "y: expected a tensor of integers"),
        ({"y": torch.full((4,), 10)}, ValueError, "y: expected classes from 0 to 9, got 10"),
        ({"p": 1.5}, ValueError, "p: expected"),
        ({"p": -0.1}, ValueError, "p: expected"),
        ({"colours": 8}, ValueError, "colours: expected 1 or 32, got 8"),
        ({"maps": torch.zeros(32, 10, dtype=torch.long)}, ValueError, "maps: expected 32 permutations"),
        ({"maps": torch.arange(10).expand(8, 10)}, ValueError, "maps: expected 32 permutations"),
        ({"maps": colour_maps(generator()), "colours": 1}, ValueError, "maps: expected one map"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(change, error, message):
    g = generator()
    before = g.get_state()
    arguments = {"x": torch.zeros(4, 1, 14, 14), "y": torch.zeros(4, dtype=torch.long), "p": 0.5, **change}
    with pytest.raises(error, match=message):
        multicolor(**arguments, generator=g)
    assert torch.equal(g.get_state(), before)
