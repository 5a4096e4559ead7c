"""The claims of LAE's experiment: which copy of which arm is held against which other one.

The abstract says which tasks each copy is good at: the online one the new tasks, the offline one the old. The other
comparisons are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...results import finding

__all__ = ["difference", "numbers", "rows"]

Arm = tuple[str, str]  # name and module


LOCAL = "sequential, local loss"


PLAIN = "Prefix, not calibrated"


def numbers(runs: Sequence[Mapping[str, Any]], copy_of: str) -> dict[str, list[float]]:
    """Accuracy on old and on new classes, averaged over tasks 2 to 5, and on all after the last; one for each seed."""
    found: dict[str, list[float]] = {"old": [], "new": [], "last": []}
    for one in runs:
        scores = one[copy_of]
        for side in ("old", "new"):
            found[side].append(sum(scores[side][1:]) / len(scores[side][1:]))
        found["last"].append(scores["all"][-1])
    return found


def asked(pets: Sequence[str]) -> list[tuple[str, str, str, tuple[Arm, str], tuple[Arm, str]]]:
    """The claims: words, where they stand, what is measured, and the two arms with their copies."""
    found: list[tuple[str, str, str, tuple[Arm, str], tuple[Arm, str]]] = []
    never = ("frozen", "Adapter"), "online"
    for pet in pets:
        vote = ("LAE", pet), "ensemble"
        fast = ("LAE", pet), "online"
        slow = ("LAE", pet), "offline"
        found += [
            (f"LAE over sequential, {pet}", "ours", "last", vote, (("sequential", pet), "online")),
            (f"LAE over sequential with the local loss, {pet}", "ours", "last", vote, ((LOCAL, pet), "online")),
            (f"the vote over the online copy, {pet}", "ours", "last", vote, fast),
            (f"LAE over a module that is never trained, {pet}", "ours", "last", vote, never),
            (f"the offline copy over the online one, old classes, {pet}", "abstract", "old", slow, fast),
            (f"the online copy over the offline one, new classes, {pet}", "abstract", "new", fast, slow),
        ]
    vote = ("LAE", "Adapter"), "ensemble"
    mean = ("LAE", "Adapter"), "mean vote"
    prefix = ("LAE", "Prefix"), "ensemble"
    digits = ("LAE, digits", "Adapter"), "ensemble"
    return [
        *found,
        ("a calibrated prefix over one that is not", "ours", "last", prefix, (("LAE", PLAIN), "ensemble")),
        ("frozen epochs over none, Adapter", "ours", "last", vote, (("none frozen", "Adapter"), "ensemble")),
        ("the local loss over the global, Adapter", "ours", "last", vote, (("global loss", "Adapter"), "ensemble")),
        ("the maximum over the mean, Adapter", "ours", "last", vote, mean),
        ("LAE over never trained, digits, Adapter", "ours", "last", digits, (("frozen, digits", "Adapter"), "online")),
    ]


def rows(ends: Mapping[Arm, Mapping[str, Mapping[str, list[float]]]], pets: Sequence[str]) -> list[dict[str, Any]]:
    """The claims whose arms were run: differences of accuracies in %, the same orders of the classes."""
    found = []
    for claim, where, side, (first, one), (second, two) in asked(pets):
        if first in ends and second in ends:
            names = [f"{' / '.join(arm)}, {name}" for arm, name in ((first, one), (second, two))]
            pair = dict(zip(names, (ends[first][one][side], ends[second][two][side]), strict=True))
            found.append(difference(claim, where, pair))
    return found


def difference(claim: str, where: str, pair: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The row of a claim, from the accuracies of its two arms."""
    ours, theirs = pair.values()
    level = {arm: sum(v) / len(v) for arm, v in pair.items()}
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    return finding(claim, values, where=where, unit="points", level=level)
