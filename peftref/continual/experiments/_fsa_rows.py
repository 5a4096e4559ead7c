"""Findings of the recorded run of first session adaptation: paired differences of accuracy after the last session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...results import finding

__all__ = ["first_sizes", "heads_and_bodies", "twice_the_epochs"]

DOMAINS = {"clean": "photographs", "noisy": "noisy photographs"}
NAMES = {"film": "FiLM", "full": "full"}
FEW = "abstract: few-shot, which is 50 images there"
HEADS = "abstract: LDA is the head best suited"

Ends = Mapping[tuple[str, int, str], Sequence[float]]


def heads_and_bodies(ends: Ends, nearest: Ends, linears: Ends) -> list[dict[str, Any]]:
    """What each body and each head is worth, in each domain and with each number of images.

    Args:
        ends: accuracy of each seed, by domain, images of a class, and body; the head is LDA.
        nearest: the same with the nearest class mean.
        linears: by domain, images of a class, and the linear head's loss; on the unadapted body.
    """
    found = []
    for domain, shots in dict.fromkeys(key[:2] for key in ends):
        none, film, full = (ends[domain, shots, kind] for kind in ("none", "film", "full"))
        place = _place(domain, shots)
        found += [
            _row(f"FiLM over none, {place}", "FiLM", film, "none", none, FEW),
            _row(f"FiLM over full, {place}", "FiLM", film, "full", full, FEW),
            _row(f"full over none, {place}", "full", full, "none", none, "ours"),
            _row(f"LDA over nearest mean, {place}", "LDA", none, "nearest", nearest[domain, shots, "none"], HEADS),
        ]
        for loss in ("global", "local"):
            other = linears[domain, shots, loss]
            found.append(_row(f"LDA over linear, {loss} loss, {place}", "LDA", none, "linear", other, "ours"))
    return found


def first_sizes(
    resized: Mapping[tuple[int, str], Sequence[float]], none: Sequence[float], where: tuple[str, int], usual: int
) -> list[dict[str, Any]]:
    """What adapting is worth after a first session of another size.

    Args:
        resized: accuracy of each seed, by classes of the first session, and body.
        none: of the body as it is, whose head does not depend on the sessions.
        where: domain and images of a class.
        usual: the size of the first session that :func:`heads_and_bodies` has.
    """
    return [
        _row(f"{NAMES[kind]} over none, {_place(*where)}, first {size} classes", NAMES[kind], end, "none", none, "ours")
        for (size, kind), end in resized.items()
        if size != usual
    ]


def twice_the_epochs(longer: Mapping[str, Sequence[float]], ends: Ends, where: tuple[str, int]) -> list[dict[str, Any]]:
    """What twice the epochs change."""
    return [
        _row(f"{NAMES[kind]}: twice the epochs, {_place(*where)}", "twice", end, "once", ends[(*where, kind)], "ours")
        for kind, end in longer.items()
    ]


def _place(domain: str, shots: int) -> str:
    return f"{DOMAINS[domain]}, {shots} images"


def _row(claim: str, left: str, a: Sequence[float], right: str, b: Sequence[float], where: str) -> dict[str, Any]:
    differences = [p - q for p, q in zip(a, b, strict=True)]
    level = {right: float(np.mean(b)), left: float(np.mean(a))}
    return finding(claim, differences, where=where, unit="points", level=level)
