"""What the recorded run of the chapter on BANG trains and measures: digits amid coloured patches, many worlds at once.

In the first data set half of the colours of the upper patches tell the class, in the second those of the lower ones.
Networks are trained on the first and fine-tuned on the second; under the shift colours are drawn anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Dataset, Split
from ..bang import calibration_error, confidence, outcomes
from ..baselines.arithmetic import wise_ft
from ..core.loop import merge
from .colournets import ColourNets, hits, scenes, train
from .spurious import spurious_accuracy

SHIFT = 0.9  # under the shift a colour is drawn anew with this probability
TENTHS = [i / 10 for i in range(11)]
STRENGTHS: dict[str, list[dict[str, float]]] = {
    "smoothing": [{"smoothing": e} for e in (0.1, 0.3)],
    "Mixup": [{"mixing": a} for a in (0.2, 1.0)],
    "both": [{"smoothing": 0.1, "mixing": a} for a in (0.2, 1.0)],
}
MARGINS = torch.linspace(-2, 8, 4001, dtype=torch.double)
LOUDNESS = torch.tensor([0.1, 0.2, 0.33, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0], dtype=torch.double)
POWERS = {"digit": 1, "patches": 1, "b1": 1, "w2": 1, "b2": 2, "w3": 1, "b3": 3}  # of a factor of all layers


@dataclass(frozen=True)
class Worlds:
    """The data of the second experiment, in several worlds that differ in what colours mean."""

    fit: Split
    validation: Split
    first: Tensor
    second: Tensor
    check: Tensor
    same: Tensor
    shifted: Tensor
    y: Tensor

    @classmethod
    def of(cls, digits: Dataset, worlds: Sequence[int]) -> Worlds:
        """Draw the worlds; three quarters of the training digits are for learning, the others for validation."""
        rows = torch.randperm(len(digits.train.y), generator=torch.Generator().manual_seed(0))
        parts = rows.split(len(rows) * 3 // 4)
        fit, validation = (Split(digits.train.x[i], digits.train.y[i]) for i in parts)
        return cls(
            fit=fit,
            validation=validation,
            first=scenes(fit, 0.5, worlds, "first", lower=1.0),
            second=scenes(fit, 1.0, worlds, "second", lower=0.5),
            check=scenes(validation, 1.0, worlds, "validation", lower=0.5),
            same=scenes(digits.test, 1.0, worlds, "test", lower=0.5),
            shifted=scenes(digits.test, SHIFT, worlds, "shifted"),
            y=digits.test.y,
        )


def outputs(nets: ColourNets, x: Tensor) -> Tensor:
    """Logits of each network, without a graph."""
    with torch.no_grad():
        logits: Tensor = nets(x)
    return logits


def between(a: ColourNets, b: ColourNets, alpha: float = 0.5) -> ColourNets:
    """WiSE-FT: the networks at (1 - alpha) a + alpha b."""
    nets = copy.deepcopy(a)
    nets.load_state_dict(merge(a.state_dict(), [b.state_dict()], wise_ft(alpha)))
    return nets


def score(nets: ColourNets, x: Tensor, y: Tensor) -> Tensor:
    """Accuracy of each network in %."""
    return 100 * hits(outputs(nets, x), y).mean(0)


def loudness(first: Tensor, second: Tensor) -> float:
    """Ratio of the standard deviations of the logits over the classes, mean over everything."""
    return (second.std(-1).mean() / first.std(-1).mean()).item()


def louder(nets: ColourNets, factor: float, powers: Mapping[str, int] = POWERS, root: int = 3) -> ColourNets:
    """All layers grow by the same, biases so that every output grows by the factor."""
    nets = copy.deepcopy(nets)
    state = {name: t * factor ** (powers.get(name, 0) / root) for name, t in nets.state_dict().items()}
    nets.load_state_dict(state)
    return nets


def counted(start: ColourNets, tuned: ColourNets, alpha: float, worlds: Worlds) -> dict[str, float]:
    """Share of each outcome in %, mean over the worlds."""
    nets = (start, tuned, between(start, tuned, alpha))
    classes = [outputs(n, worlds.shifted).argmax(-1).unbind(1) for n in nets]
    tables = [outcomes(worlds.y, *world)["fraction"] for world in zip(*classes, strict=True)]
    return {str(case): float(share) for case, share in (100 * pd.concat(tables, axis=1).mean(axis=1)).items()}


def tuned(
    start: ColourNets, worlds: Worlds, trials: Sequence[dict[str, float]], steps: int
) -> tuple[ColourNets, dict[str, float]]:
    """The first trial within half a point of the best on validation images of the second data set."""
    nets = [trained(start, worlds.second, worlds.fit.y, steps, seed=2, **trial) for trial in trials]
    level = [score(n, worlds.check, worlds.validation.y).mean().item() for n in nets]
    chosen = next(i for i, v in enumerate(level) if v > max(level) - 0.5)
    return nets[chosen], trials[chosen]


def described(logits: Tensor, worlds: Worlds) -> dict[str, float]:
    """Confidence and calibration error in %."""
    probs = logits.softmax(-1).flatten(0, 1)
    error = calibration_error(probs, worlds.y.repeat_interleave(logits.shape[1]))
    return {"confidence": 100 * confidence(probs), "calibration error": 100 * error}


def law(start: ColourNets, tuned: ColourNets, worlds: Worlds) -> dict[str, Any]:
    """x0, x1, rho and lambda of a pair, and the accuracy of the sum of outputs for each loudness."""
    first = outputs(start, worlds.shifted)
    second = outputs(tuned, worlds.shifted)
    measured = loudness(first, second)
    first = first * measured
    seen = [100 * hits(first + scale * second, worlds.y).mean().item() for scale in LOUDNESS]
    accuracies = [hits(f, worlds.y).mean() for f in (first, second, first + second)]
    x0, x1, x = (margin_of(100 * value) for value in accuracies)
    return {"x0": x0, "x1": x1, "rho": ((x0 + x1) / x) ** 2 / 2 - 1, "lambda": measured, "seen": seen}


def margin_of(percent: Tensor) -> float:
    """The margin at which the theory promises an accuracy: the inverse of F_p, to 0.0025."""
    levels = 100 * spurious_accuracy(MARGINS, SHIFT, 10)
    place = torch.searchsorted(levels, percent.double()).clamp(max=len(MARGINS) - 1)
    return MARGINS[place].item()


def predicted(x0: float, x1: float, rho: float, loudness: Tensor | float) -> Tensor:
    """Accuracy in % of the sum of outputs (eq-bang-unequal), with the loudness as the ratio of the noise."""
    kappa = torch.as_tensor(loudness, dtype=torch.double)
    x = (x0 + kappa * x1) / (1 + kappa**2 + 2 * rho * kappa).sqrt()
    return 100 * spurious_accuracy(x, SHIFT, classes=10)


def pairs(digits: Dataset, worlds: Sequence[int], colours: int, steps: int, snapshots: Sequence[int]) -> Any:
    """One pair of networks for each world, the two halves of one stack."""
    x = scenes(digits.train, 0.0, worlds, "train", colours=colours).repeat(1, 2, 1)
    nets = ColourNets(range(20, 20 + 2 * len(worlds)))
    return train(nets, x, digits.train.y, steps, loss=F.mse_loss, snapshots=snapshots)


def judged(nets: ColourNets, x: Tensor, y: Tensor) -> list[list[float]]:
    """In %, one row per world: both networks alone, the sum of their outputs, both wrong and the sum right."""
    a, b = outputs(nets, x.repeat(1, 2, 1)).chunk(2, 1)
    first, second, both = (hits(o, y).bool() for o in (a, b, a + b))
    shares = torch.stack([first, second, both, ~first & ~second & both], -1)
    table: list[list[float]] = (100 * shares.double().mean(0)).tolist()
    return table


def trained(start: ColourNets, x: Tensor, y: Tensor, steps: int, seed: int, **options: Any) -> ColourNets:
    """A trained copy of the networks."""
    nets = train(start, x, y, steps, seed=seed, **options)
    assert isinstance(nets, ColourNets)  # a list only where snapshots are asked for
    return nets
