"""WiSE-FT's average against other ways to interpolate; theory, counting, painting and training against their loops."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks._timing import Row, bytes_floor, compare
from peftref.data import load
from peftref.data.domains import generator_for
from peftref.merging.baselines.arithmetic import wise_ft
from peftref.merging.core.loop import merge
from peftref.merging.experiments import spurious
from peftref.merging.experiments.colournets import ColourNets, scenes, train
from peftref.merging.experiments.multicolor import colour_maps, multicolor
from tests._naive.bang import Models, quad_accuracy
from tests._naive.multicolor import loop_paint


def interpolation() -> list[Row]:
    """A transformer's worth of tensors, 86 M parameters in the shapes of ViT-B."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,), (768,), (768,)]
    base, tuned = (
        {f"{block}.{i}": torch.randn(s, generator=g) for block in range(12) for i, s in enumerate(shapes)}
        for _ in range(2)
    )
    alpha = 0.5

    def ours() -> dict[str, Tensor]:
        return merge(base, [tuned], wise_ft(alpha))

    def loop() -> dict[str, Tensor]:
        return {n: (1 - alpha) * t + alpha * tuned[n] for n, t in base.items()}

    def lerp() -> dict[str, Tensor]:
        return {n: torch.lerp(t, tuned[n], alpha) for n, t in base.items()}

    class Weights(nn.Module):
        def __init__(self, state: dict[str, Tensor]) -> None:
            super().__init__()
            self.all = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in state.values()])

    first, second = Weights(base), Weights(tuned)

    def swa() -> dict[str, Tensor]:
        averaged = torch.optim.swa_utils.AveragedModel(first)
        averaged.update_parameters(first)
        averaged.update_parameters(second)
        return dict(zip(base, averaged.module.all, strict=True))

    least = bytes_floor(3 * sum(t.nbytes for t in base.values()))  # two networks read, one written
    rows = []
    for name, peer, exact in (
        ("(1 - alpha) a + alpha b for each tensor", loop, False),
        ("torch.lerp for each tensor", lerp, True),
        ("torch.optim.swa_utils.AveragedModel of the two", swa, False),
    ):
        merged, other = ours(), peer()
        for key, t in merged.items():  # the same arithmetic gives the same bits, another order of it nearly so
            assert_close(t, other[key].detach(), rtol=0, atol=0 if exact else 1e-6)
        claim = f"WiSE-FT of 85 M weights against {peer.__name__}"
        rows.append(compare(claim, ours, peer, peer_name=name, floor=least))
    return rows


def theory() -> Row:
    """Accuracies of ensembles over a grid of p and of shared features."""
    p, shared, classes = torch.linspace(0.1, 1, 10)[:, None].double(), torch.arange(0, 21, 4), 10

    def ours() -> Tensor:
        return spurious.spurious_accuracy(spurious.margin_wse(p, 2, 20, n_so=shared), p, classes)

    def peer() -> Tensor:
        x = spurious.margin_wse(p, 2, 20, n_so=shared)
        return torch.tensor(
            [[quad_accuracy(v, q, classes) for v in row] for row, q in zip(x.tolist(), p[:, 0].tolist(), strict=True)]
        )

    assert_close(ours(), peer().double(), rtol=0, atol=1e-6)
    return compare(
        "accuracy at 10 x 6 settings, K=10",
        ours,
        peer,
        peer_name="scipy.integrate.quad in a loop",
        warmup=1,
        repeats=3,
    )


def counting() -> Row:
    """The same Monte Carlo, drawn and counted at once or sample by sample."""
    pair, p, classes, draws = {"n_v": 2, "n_s": 20, "n_v2": 2, "n_s2": 20, "n_vo": 1, "n_so": 8}, 0.9, 10, 2000

    def ours() -> spurious.Simulation:
        return spurious.simulate(p, **pair, classes=classes, draws=draws, generator=torch.Generator().manual_seed(0))

    models = Models(**pair, classes=classes)

    def peer() -> list[float]:
        return models.sample(p, draws, seed=0).tolist()

    for a, b in zip(ours(), peer(), strict=True):  # two Monte Carlo estimates of one number
        assert abs(a - b) < 4 * math.sqrt(2 * max(b * (1 - b), 1 / draws) / draws), (a, b)
    name = "the models written out in NumPy (tests/_naive/bang.py)"
    return compare("2000 draws of 34 features, K=10", ours, peer, peer_name=name, warmup=1, repeats=3)


def painting() -> Row:
    digits = load("mnist5k").train
    maps = colour_maps(torch.Generator().manual_seed(0))

    def ours() -> Tensor:
        return multicolor(*digits, 0.7, generator=torch.Generator().manual_seed(1), maps=maps).x

    shown = multicolor(*digits, 0.7, generator=torch.Generator().manual_seed(1), maps=maps).shown.numpy()
    grey = digits.x[:, 0].numpy()

    def peer() -> Tensor:  # it is spared the draws
        return torch.from_numpy(loop_paint(grey, shown, maps.numpy()))

    assert torch.equal(ours(), peer())
    name = "patch by patch in NumPy (tests/_naive/multicolor.py)"
    return compare("MultiColorMNIST, 4000 images, drawn and painted", ours, peer, peer_name=name, warmup=1, repeats=3)


def networks(count: int = 4, steps: int = 100) -> Row:
    """The paper's perceptrons, 5292-64-64-10, in as many worlds: one batched product, or one after the other."""
    split, worlds = load("mnist5k").train, range(count)
    x, target = scenes(split, 0.0, worlds), F.one_hot(split.y, 10).float()
    pictures = [
        multicolor(*split, 0.0, generator=generator_for("draws", s, ""), maps=colour_maps(generator_for("maps", s)))
        for s in worlds
    ]
    inputs = [made.x.flatten(1) for made in pictures]

    def ours() -> Tensor:
        return train(ColourNets(worlds), x, split.y, steps, loss=F.mse_loss)(x[:100]).detach()

    def peer() -> Tensor:
        outputs = []
        for seed in worlds:
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Linear(5292, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
            )  # fmt: skip
            optimizer, order = torch.optim.Adam(model.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
            epochs = -(-steps // (len(target) // 64))
            batches = [i for _ in range(epochs) for i in torch.randperm(len(target), generator=order).split(64)[:-1]]
            for i in batches[:steps]:
                optimizer.zero_grad()
                F.mse_loss(model(inputs[seed][i]), target[i]).backward()
                optimizer.step()
            outputs.append(model(inputs[seed][:100]).detach())
        return torch.stack(outputs, 1)

    with torch.random.fork_rng(devices=[]):
        assert_close(ours(), peer(), rtol=0, atol=2e-2)  # float32: Adam turns rounding of a tiny gradient into a step
        name = "nn.Sequential and torch.optim.Adam, one after the other"
        claim = f"{count} perceptrons 5292-64-64-10, {steps} steps"
        return compare(claim, ours, peer, peer_name=name, warmup=1, repeats=3)


def rows() -> list[Row]:
    return [*interpolation(), theory(), counting(), painting(), networks()]
