"""The claims of CLASSP's experiment: what is kept where equally much has been learned.

Methods are compared where the *mean* curve first reaches a level of accuracy on clothes (:func:`kept_at`): one step
size for all networks, with no choice of the luckiest point of a network's own curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...results import finding

__all__ = ["choice", "kept_at", "published_rows", "rows"]

RIVALS = {
    "SGD": "SGD",
    "Adam": "Adam",
    "CLASSP p=2": "AdaGrad that keeps its sums",
    "p=1, erased": "with its memory erased",
    "p=1, shuffled": "with its memory shuffled",
    "p=1, averaged": "with one number for each tensor",
    "gate only, 1/4": "the gate alone",
}


def kept_at(curves: Tensor, level: float) -> Tensor | None:
    """Accuracy on the first task of each network, at the step size where the mean network first reaches a level.

    Between neighbouring step sizes the curves are straight lines.

    Args:
        curves: accuracies on first and second task by step size, from small to large: ``(networks, rates, 2)``.
        level: accuracy on the second task.

    Returns:
        ``(networks,)``; None where the mean of the networks never reaches the level.

    >>> curves = torch.tensor([[[90.0, 20.0], [70.0, 60.0]], [[80.0, 20.0], [60.0, 60.0]]])
    >>> kept_at(curves, 40.0)
    tensor([80., 70.])
    """
    mean = curves[..., 1].mean(0)
    reached = (mean >= level).nonzero()
    if not len(reached):
        return None
    right = int(reached[0])
    if right == 0:
        return curves[:, 0, 0]
    left = right - 1
    share = (level - mean[left]) / (mean[right] - mean[left])
    return torch.lerp(curves[:, left, 0], curves[:, right, 0], share)


def choice(curves: Mapping[str, Tensor], names: Sequence[str], level: float) -> str:
    """The setting that keeps most at a level, judged by validation images."""

    def score(name: str) -> float:
        kept = kept_at(curves[name][:, :, 0], level)
        return -math.inf if kept is None else float(kept.mean())

    return max(names, key=score)


def rows(
    curves: Mapping[str, Tensor], levels: Sequence[float], chosen: Mapping[float, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """The claims: accuracy on digits kept by one method beyond another, at each level of accuracy on clothes."""
    found = []
    for level in levels:
        best = chosen[level]
        pairs = [("CLASSP keeps more than EWC", best["CLASSP"], best["EWC"], "abstract")]
        pairs += [(f"CLASSP keeps more than {other}", "CLASSP p=1", name, "ours") for name, other in RIVALS.items()]
        for claim, name, other, where in pairs:
            ours = kept_at(curves[name][:, :, 1], level)
            theirs = kept_at(curves[other][:, :, 1], level)
            if ours is not None and theirs is not None:
                level_of = {name: float(ours.mean()), other: float(theirs.mean())}
                values = (ours - theirs).tolist()
                claim = f"{claim}, {level:g} % on clothes"
                found.append(finding(claim, values, where=where, unit="points", level=level_of))
    return found


def published_rows(values: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """What the published protocol keeps and learns beyond SGD at the same rate, on test images."""
    found = []
    for claim, column in (("keeps", 1), ("learns", 2)):
        ours = [row[column] for row in values["published protocol"]]
        theirs = [row[column] for row in values["SGD"]]
        level = {"published protocol": sum(ours) / len(ours), "SGD": sum(theirs) / len(theirs)}
        pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
        what = f"the published protocol {claim} more than SGD, the same step size"
        found.append(finding(what, pairs, where="ours", unit="points", level=level))
    return found
