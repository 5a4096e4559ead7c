r"""Many small networks on MultiColorMNIST, trained side by side: the experiments of the chapter on BANG.

Each network is the published one (Lin et al., ICLR 2024): 42 x 42 x 3 inputs, two hidden layers of 64 with ReLU, ten
outputs, torch's initialisation, Adam. Two things make a dozen of them cheap on one core. They are trained in one
batched product per layer. And the first layer is folded: all 49 pixels of a patch have one colour, all three channels
of the digit one level, so that of the 5,292 inputs only 292 differ. With :math:`\bar w` the mean of the m weights that
see equal inputs z,

.. math:: \sum_{i=1}^m w_i z=(mz)\,\bar w .

Equal inputs have equal gradients, g, so the gradient of :math:`\bar w` is :math:`mg`; Adam divides by its size, and if
its constant :math:`\varepsilon` is m times as large too, :math:`\bar w` moves as each :math:`w_i` does. The folded
network *is* the published one, 18 times smaller.

>>> from peftref.data import load
>>> digits = load("mnist5k")
>>> train_x, test_x = (scenes(s, p, [0, 1]) for s, p in ((digits.train, 0.0), (digits.test, 0.7)))
>>> train_x.shape  # the same digits in two worlds, whose colours mean different things
torch.Size([4000, 2, 292])
>>> nets = train(ColourNets([0, 1]), train_x, digits.train.y, steps=100, loss=torch.nn.functional.mse_loss)
>>> with torch.no_grad():
...     outputs = nets(test_x)
>>> outputs.shape, (hits(outputs, digits.test.y).mean(0) > 0.2).tolist()
(torch.Size([1000, 2, 10]), [True, True])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Split
from ...data.domains import generator_for
from ..bang import mixup, smooth, soft_cross_entropy
from .multicolor import PATCHES, colour_maps, multicolor

__all__ = ["ColourNets", "distinct", "hits", "scenes", "train"]

SIDE = 42
CELL = 7
DIGIT = slice(2 * CELL, 4 * CELL)
BORDER = torch.ones(6, 6, dtype=torch.bool)
BORDER[2:4, 2:4] = False
TIMES = torch.tensor([3.0] * 196 + [49.0] * 96)  # how often each of the 292 inputs stands in the picture
EPS = 1e-8  # Adam's constant, torch's default


class ColourNets(nn.Module):
    """R networks, one per world.

    Args:
        seeds: of the R initialisations.
        hidden: width of both hidden layers.

    Shape:
        ``(N, R, 292)`` or, the same inputs to all, ``(N, 1, 292) -> (N, R, 10)``.
    """

    digit: Tensor
    patches: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor

    def __init__(self, seeds: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        if not seeds:
            raise ValueError("seeds: expected at least one, got none")
        states = [_initial(seed, hidden) for seed in seeds]
        for name in states[0]:
            self.register_parameter(name, nn.Parameter(torch.stack([state[name] for state in states])))

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1).expand(len(self.b1), -1, -1)  # (R, N, 292)
        h = torch.baddbmm(self.b1, h, torch.cat([self.digit, self.patches], 1)).relu()
        h = torch.baddbmm(self.b2, h, self.w2).relu()
        return torch.baddbmm(self.b3, h, self.w3).transpose(0, 1)


def scenes(
    split: Split, p: float, seeds: Sequence[int], part: str = "", *, lower: float | None = None, colours: int = PATCHES
) -> Tensor:
    """Digits in coloured surroundings, in R worlds that differ in what colours mean: ``(N, R, 292)``, times how often.

    Args:
        split: grey digits.
        p: probability with which a patch's class is drawn anew (see
            :func:`peftref.merging.experiments.multicolor.multicolor`).
        seeds: one per world; a seed always gives the same maps.
        part: name of the data set ("train"); other parts have other draws.
        lower: another probability for the 16 patches of the lower half of the picture; default: ``p``.
        colours: 32 or 1.
    """
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    worlds = []
    for seed in seeds:
        maps = colour_maps(generator_for("maps", seed), colours)
        generator = generator_for("draws", seed, part)
        x = multicolor(*split, p, generator=generator, colours=colours, maps=maps).x
        if lower is not None:
            below = multicolor(*split, lower, generator=generator, colours=colours, maps=maps).x
            x = torch.cat([x[..., : SIDE // 2, :], below[..., SIDE // 2 :, :]], -2)
        worlds.append(distinct(x) * TIMES)
    return torch.stack(worlds, 1)


def distinct(x: Tensor) -> Tensor:
    """The 292 different numbers of pictures, or means of the weights that see equal pixels: ``(N, 3, 42, 42)``."""
    digit = x[:, :, DIGIT, DIGIT].mean(1).flatten(1)  # (N, 196)
    patches = F.avg_pool2d(x, CELL)[:, :, BORDER].flatten(1)  # (N, 96)
    return torch.cat([digit, patches], 1)


def train(
    nets: ColourNets,
    x: Tensor,
    y: Tensor,
    steps: int,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = soft_cross_entropy,
    smoothing: float = 0.0,
    mixing: float | None = None,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    snapshots: Sequence[int] = (),
) -> ColourNets | list[ColourNets]:
    """A trained copy of the networks; all see the same digits in the same order, each in the colours of its world.

    Args:
        nets: where to start from; not changed.
        x: of :func:`scenes`, ``(N, R, 292)``.
        y: classes ``(N,)``.
        steps: batches.
        loss: of outputs and soft targets, both ``(N, R, 10)``.
        smoothing: strength of label smoothing.
        mixing: a of Mixup's Beta(a, a); ``None`` for no Mixup.
        lr: of Adam, constant (1e-3: official code).
        batch_size: 64 in the official code.
        seed: of the order of the batches and of Mixup.
        snapshots: return a list, the copies after these numbers of steps and the last one.
    """
    if steps < 0 or batch_size < 1:
        raise ValueError(f"steps, batch_size: expected at least 0 and 1, got {steps} and {batch_size}")
    if x.ndim != 3 or not len(y) or x.shape[0] != len(y):
        raise ValueError(f"x, y: expected shapes (N, R, 292) and (N,), got {tuple(x.shape)} and {tuple(y.shape)}")
    nets = copy.deepcopy(nets)
    generator = torch.Generator().manual_seed(seed)
    taken = []
    times = {"digit": 3, "patches": 49}
    groups = [{"params": [p], "eps": EPS * times.get(name, 1)} for name, p in nets.named_parameters()]
    optimizer = torch.optim.Adam(groups, lr, fused=True)
    targets = F.one_hot(y, 10).to(x.dtype)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(len(y), generator=generator)
        batch = order[:batch_size]
        order = order[batch_size:]
        inputs = x[batch]
        wanted = targets[batch]
        if mixing is not None:
            inputs, wanted = mixup(inputs, wanted, mixing, generator=generator)
        outputs = nets(inputs)
        wanted = smooth(wanted, smoothing)[:, None].expand_as(outputs)
        optimizer.zero_grad()
        (loss(outputs, wanted) * outputs.shape[1]).backward()  # times R: each network has the gradient of its own mean
        optimizer.step()
        if step in snapshots:
            taken.append(copy.deepcopy(nets))
    return [*taken, nets] if snapshots else nets


def hits(outputs: Tensor, y: Tensor) -> Tensor:
    """Whether each network predicts each class right: outputs ``(N, R, K)``, classes ``(N,)`` -> float ``(N, R)``."""
    return (outputs.argmax(-1) == y[:, None]).float()


def _initial(seed: int, hidden: int) -> dict[str, Tensor]:
    """One published network at its initialisation, the first layer folded; matrices are transposed for ``x @ w``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(3 * SIDE**2, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)
    first, second, third = (layer.weight.detach() for layer in layers)
    folded = distinct(first.view(hidden, 3, SIDE, SIDE)).T
    weights = {"digit": folded[:196], "patches": folded[196:], "w2": second.T, "w3": third.T}
    biases = {f"b{i}": layer.bias.detach()[None] for i, layer in enumerate(layers, 1)}
    return {name: t.contiguous() for name, t in (weights | biases).items()}
