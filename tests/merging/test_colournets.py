"""The folded networks are the published ones; worlds differ as they should."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from peftref.data import Split, load
from peftref.data.domains import generator_for
from peftref.merging.bang import soft_cross_entropy
from peftref.merging.experiments.colournets import TIMES, ColourNets, distinct, hits, scenes, train
from peftref.merging.experiments.multicolor import colour_maps, multicolor


def some(n: int) -> Split:
    digits = load("mnist5k").train
    return Split(digits.x[::20][:n], digits.y[::20][:n])


def published(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(5292, 64), nn.Linear(64, 64), nn.Linear(64, 10)
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def test_folding_loses_nothing():
    pictures = multicolor(*some(8), 0.5, generator=torch.Generator().manual_seed(0)).x
    assert TIMES.sum() == 3 * 42 * 42
    weights = torch.randn(5, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    whole = pictures.flatten(1) @ weights.flatten(1).T
    assert_close((distinct(pictures) * TIMES) @ distinct(weights).T, whole, rtol=1e-4, atol=1e-3)


def test_trains_like_the_published_network():
    """In float64: Adam turns the round-off of a gradient near zero into a whole step."""
    split, worlds = some(64), (3, 4)
    x = scenes(split, 0.2, worlds, "a").double()
    start = ColourNets([5, 6]).double()
    nets = train(start, x, split.y, 8, loss=F.mse_loss, batch_size=64)  # one batch: its order does not matter
    for r, (world, seed) in enumerate(zip(worlds, (5, 6), strict=True)):
        maps, draws = colour_maps(generator_for("maps", world)), generator_for("draws", world, "a")
        pictures = multicolor(*split, 0.2, generator=draws, maps=maps).x.double()
        model = published(seed).double()
        assert_close(start(x)[:, r], model(pictures), rtol=0, atol=1e-6)  # the fold of the start is rounded to float32
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(8):
            optimizer.zero_grad()
            F.mse_loss(model(pictures), F.one_hot(split.y, 10).double()).backward()
            optimizer.step()
        assert_close(nets(x)[:, r], model(pictures), rtol=0, atol=1e-5)


def test_networks_do_not_hear_of_each_other():
    split = some(50)
    x = scenes(split, 0.3, (0, 1, 2), "a")
    options = {"loss": soft_cross_entropy, "smoothing": 0.1, "mixing": 0.5, "batch_size": 20}
    three = train(ColourNets([0, 1, 2]), x, split.y, 6, **options)
    one = train(ColourNets([1]), x[:, 1:2], split.y, 6, **options)
    assert_close(three(x)[:, 1], one(x[:, 1:2])[:, 0])


def test_each_argument_of_training_counts_and_the_start_stays():
    split, start = some(40), ColourNets([0])
    before = {name: t.clone() for name, t in start.state_dict().items()}
    x = scenes(split, 0.3, [0])
    changes = [{}, {"smoothing": 0.2}, {"mixing": 1.0}, {"lr": 1e-4}, {"seed": 1}, {"batch_size": 10}]
    changes += [{"loss": F.mse_loss}]
    outputs = torch.stack([train(start, x, split.y, 3, **{"batch_size": 20, **c})(x) for c in changes])
    assert (torch.pdist(outputs.flatten(1)) > 1e-4).all()
    assert all(torch.equal(before[name], t) for name, t in start.state_dict().items())


def test_snapshots_lie_on_the_way():
    split = some(40)
    x = scenes(split, 0.0, [0])
    first, last = train(ColourNets([0]), x, split.y, 5, batch_size=20, snapshots=[2])
    assert torch.equal(first.patches, train(ColourNets([0]), x, split.y, 2, batch_size=20).patches)
    assert torch.equal(last.patches, train(ColourNets([0]), x, split.y, 5, batch_size=20).patches)


def test_worlds_and_halves():
    split = some(200)
    perfect, broken = scenes(split, 0.0, [0, 1], "a"), scenes(split, 0.0, [0, 1], "a", lower=1.0)
    pixels = perfect[:, :, 196:].view(200, 2, 3, 32)
    assert not torch.equal(pixels[:, 0], pixels[:, 1]), "colours mean different things in different worlds"
    same = (perfect == broken)[:, :, 196:].view(200, 2, 3, 32).all(2).float().mean((0, 1))
    assert (same[:16] == 1).all() and (same[16:] < 0.3).all(), "the upper half keeps its colours, the lower one not"
    assert torch.equal(perfect[..., :196], broken[..., :196]), "the digit is whole"
    assert torch.equal(scenes(split, 0.0, [1], "b"), perfect[:, 1:]), "without failures the draws do not matter"
    assert not torch.equal(scenes(split, 0.5, [1], "b"), scenes(split, 0.5, [1], "a"))


def test_hits():
    outputs = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    assert hits(outputs, torch.tensor([1, 1])).tolist() == [[1.0, 0.0], [1.0, 1.0]]
