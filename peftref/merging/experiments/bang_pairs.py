"""Two networks on MultiColorMNIST that differ in their initialisation: the paper's experiment, and what they use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data import load
from . import bang_studies as studies
from .bang_studies import outputs
from .colournets import ColourNets, scenes

SHARES = (0.7, 0.8, 0.9)  # p


def coloured_pairs(count: int, batches: Sequence[int], few: bool) -> dict[str, Any]:
    """Accuracies in % of pairs, of the sums of their outputs, and of what each patch does to the logits.

    Args:
        count: of the pairs, one in each world.
        batches: after which to look; the networks with one colour stop at the second of them.
        few: a small stand-in for the digits.
    """
    digits = load("digits" if few else "mnist5k")
    y = digits.test.y
    worlds = range(count)
    tests = {(c, p): scenes(digits.test, p, worlds, "test", colours=c) for c in (32, 1) for p in SHARES}
    stages = dict(zip(batches, studies.pairs(digits, worlds, 32, batches[-1], batches[:-1]), strict=True))
    nets = {32: stages[batches[-1]], 1: studies.pairs(digits, worlds, 1, batches[1], ())}
    found = {f"{c} colour{'s' * (c > 1)}, p = {p}": studies.judged(nets[c], x, y) for (c, p), x in tests.items()}
    longer = {str(steps): studies.judged(n, tests[32, 0.7], y) for steps, n in stages.items()}
    effect = _effects(nets[32], scenes(digits.train, 0.0, worlds, "train"), digits.train.y, tests[32, 0.9][:50])
    summed = effect[:count] + effect[count:]
    readings = {
        name: {**_use(e), "readings alone": _by_readings(e, y)}
        for name, e in {"one network": effect, "outputs added": summed}.items()
    }
    return {"found": found, "longer": longer, "readings": readings}


def _effects(nets: ColourNets, train: Tensor, y: Tensor, base: Tensor) -> Tensor:
    """What each patch in the colour of each class does to the logits, centred: networks, patches, shown, logit."""
    donors = train[[int((y == k).nonzero()[0]) for k in range(10)]].repeat(1, 2, 1)  # the colours of each class
    base = base.repeat(1, 2, 1)
    effect = torch.empty(base.shape[1], 32, 10, 10)
    for j in range(32):
        channels = 196 + j + 32 * torch.arange(3)
        for k in range(10):
            x = base.clone()
            x[..., channels] = donors[k][:, channels]
            effect[:, j, k] = outputs(nets, x).mean(0)
    effect -= effect.mean(2, keepdim=True)
    effect -= effect.mean(3, keepdim=True)
    return effect


def _use(effect: Tensor) -> dict[str, float]:
    """How many patches are in use, and the share of the clean pattern in all that they do, in %."""
    strength = (effect * (torch.eye(10) - 0.1)).sum((2, 3)) / 9
    used = strength.sum(1) ** 2 / (strength**2).sum(1)
    purity = 9 * (strength**2).sum(1) / (effect**2).sum((1, 2, 3))
    return {"patches in use": used.mean().item(), "purity": 100 * purity.mean().item()}


def _by_readings(effect: Tensor, y: Tensor, p: float = 0.7) -> float:
    """Accuracy in % of a network that only adds up what each patch does to the logits."""
    generator = torch.Generator().manual_seed(0)
    labels = y.expand(len(effect), -1)[..., None]
    anew = torch.rand(len(effect), len(y), 32, generator=generator) < p
    shows = torch.where(anew, torch.randint(10, anew.shape, generator=generator), labels)  # network, image, patch
    nets = torch.arange(len(effect))[:, None, None]
    logits = effect[nets, torch.arange(32), shows].sum(2)
    return 100 * (logits.argmax(-1) == y).double().mean().item()
