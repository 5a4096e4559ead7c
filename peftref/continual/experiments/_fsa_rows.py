"""Findings of the recorded run of first session adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...results import finding

__all__ = ["rows"]

DOMAINS = {"clean": "photographs", "noisy": "noisy photographs"}


def rows(
    ends: Mapping[tuple[str, str], Sequence[float]],
    richer: Mapping[str, Sequence[float]],
    nearest: Mapping[tuple[str, str], Sequence[float]],
    linears: Mapping[tuple[str, str], Sequence[float]],
    rich_nearest: Sequence[float],
    *,
    few: int,
    many: int,
) -> list[dict[str, Any]]:
    """The findings: each a paired difference of two arms, in points of accuracy after the last session."""

    def row(claim: str, left: str, a: Sequence[float], right: str, b: Sequence[float], where: str) -> dict[str, Any]:
        differences = [p - q for p, q in zip(a, b, strict=True)]
        level = {right: float(np.mean(b)), left: float(np.mean(a))}
        return finding(claim, differences, where=where, unit="points", level=level)

    found = []
    for domain in DOMAINS:
        none, film, full = (ends[domain, kind] for kind in ("none", "film", "full"))
        place = f"{DOMAINS[domain]}, {few} images"
        found += [
            row(f"FiLM over none, {place}", "FiLM", film, "none", none, "abstract"),
            row(f"FiLM over full, {place}", "FiLM", film, "full", full, "abstract"),
            row(f"full over none, {place}", "full", full, "none", none, "ours"),
            row(f"LDA over nearest mean, {place}", "LDA", none, "nearest", nearest[domain, "none"], "abstract"),
        ]
        found += [
            row(f"LDA over linear, {loss} loss, {place}", "LDA", none, "linear", linears[domain, loss], "abstract")
            for loss in ("global", "local")
        ]
    place = f"{DOMAINS['noisy']}, {many} images"
    return [
        *found,
        row(f"FiLM over none, {place}", "FiLM", richer["film"], "none", richer["none"], "abstract"),
        row(f"LDA over nearest mean, {place}", "LDA", richer["none"], "nearest", rich_nearest, "abstract"),
    ]
