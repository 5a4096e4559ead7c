"""The recorded run of the chapter on BANG.

The rows have no numbers of the paper: of its tables we could read only quotations without a source to link. What its
abstract says in words is judged; the rest are questions of ours.

``cpu``: the paper's small networks amid coloured patches, in several worlds (:mod:`.bang_studies`). ``t4`` and ``gpu``:
a vision transformer, fine-tuned on CIFAR-10 and shifted by corruptions (:mod:`.bang_at_scale`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data import load
from ...models import from_timm
from ...results import finding
from .bang_at_scale import run_at_scale
from .bang_pairs import coloured_pairs
from .bang_wise import wise_and_bang

CORRUPTIONS = ["gaussian_noise", "defocus_blur", "pixelate"]
LOSSES: dict[str, tuple[float, float | None]] = {"plain": (0.0, None), "both": (0.1, 0.5)}
LARGE = {"domains": CORRUPTIONS, "seeds": [0, 1, 2], "limit": 5000, "epochs": 3}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"pairs": 2, "batches": [3, 6, 12], "worlds": 2, "first": 20, "second": 10, "few": True},
    "cpu": {"pairs": 5, "batches": [300, 1000, 4500], "worlds": 6, "first": 1000, "second": 500, "few": False},
    "t4": {**LARGE, "backbone": "vit_small_patch16_224.augreg_in21k", "lr": 1e-4},
    "gpu": {**LARGE, "backbone": "vit_base_patch16_clip_224.openai", "lr": 3e-5},
}
MINUTES = {"smoke": 0.05, "cpu": 3, "t4": 50, "gpu": 10}
NEEDS = {"t4": ("cuda", "vision", "cifar10"), "gpu": ("cuda", "vision", "cifar10")}
Each = Callable[..., Any]


def run(each: Each, *, data: Path | None = None, **settings: Any) -> dict[str, Any]:
    """The small networks, or, given a ``backbone``, that."""
    if "backbone" in settings:
        return _large(each, data, **settings)
    return _small(each, **settings)


def _small(
    each: Each, pairs: int, batches: Sequence[int], worlds: int, first: int, second: int, few: bool
) -> dict[str, Any]:
    paired = each("coloured pairs", coloured_pairs, pairs, batches, few)
    tuned = each("WiSE-FT and BANG", wise_and_bang, worlds, first, second, few)
    digits = load("digits" if few else "mnist5k")
    protocol = {"data": {digits.name: digits.sha256}, "weights": None, "shift": 0.9, "batch": 64}
    arrays = {"pairs": paired, "tuned": tuned}
    return {"rows": _pair_rows(paired) + _tuned_rows(tuned), "arrays": arrays, "protocol": protocol}


def _pair_rows(paired: dict[str, Any]) -> list[dict[str, Any]]:
    many = np.array(paired["found"]["32 colours, p = 0.8"])  # (worlds, first, second, sum, both wrong and sum right)
    one = np.array(paired["found"]["1 colour, p = 0.8"])
    alone = many[:, :2].mean(1)
    gain = many[:, 2] - alone
    single = one[:, 2] - one[:, :2].mean(1)
    level = {"one network": alone.mean(), "outputs of two added": many[:, 2].mean()}
    return [
        finding("two over one, p = 0.8", gain, where="abstract", unit="points", level=level),
        finding("one colour: two over one, p = 0.8", single, where="ours", unit="points"),
    ]


def _tuned_rows(tuned: dict[str, Any]) -> list[dict[str, Any]]:
    def right(start: str, loss: str, what: str) -> Any:
        return np.array(tuned["right"][f"{start}, {loss}"][what])

    def over_plain(what: str, start: str, kind: str, **more: Any) -> dict[str, Any]:
        plain = right(start, "plain", kind)
        both = right(start, "both", kind)
        level = {"plain": plain.mean(), "BANG": both.mean()}
        return finding(what, both - plain, unit="points", level=level, **more)

    def over_parents(start: str) -> Any:
        parents = np.maximum(right(start, "plain", "first"), right(start, "plain", "fine-tuned"))
        return right(start, "plain", "weights") - parents

    rough = tuned["harder"]["0.001"]
    gain = np.array(rough["BANG"]) - np.array(rough["WiSE-FT"])
    return [
        finding("WiSE-FT over the better parent", over_parents("modest"), where="abstract", unit="points"),
        over_plain("BANG over WiSE-FT", "modest", "weights", where="abstract"),
        over_plain("BANG over plain, the fine-tuned network alone", "modest", "fine-tuned", where="ours"),
        over_plain("BANG over plain, outputs added", "modest", "outputs", where="ours"),
        finding("BANG over WiSE-FT, learning rate 0.001", gain, where="ours", unit="points"),
        finding(
            "WiSE-FT over the better parent, confident start", over_parents("confident"), where="ours", unit="points"
        ),
        over_plain("BANG over WiSE-FT, confident start", "confident", "weights", where="ours"),
        over_plain("BANG over plain, outputs added, confident start", "confident", "outputs", where="ours"),
    ]


def _large(
    each: Each,
    data: Path | None,
    backbone: str,
    domains: list[str],
    seeds: list[int],
    limit: int,
    epochs: int,
    lr: float,
) -> dict[str, Any]:
    cifar = load("cifar10", data)

    def line(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = from_timm(backbone, pretrained=True, num_classes=10)
        found = run_at_scale(model, cifar, domains, LOSSES, limit=limit, size=224, epochs=epochs, lr=lr, seed=seed)
        shifted = {loss: found["shifted (%)"].xs(loss, level="loss").tolist() for loss in LOSSES}
        return {"shifted": shifted, "protocol": found.attrs["protocol"]}

    found = [each(f"seed {seed}", line, seed) for seed in seeds]
    shifted = {loss: np.array([one["shifted"][loss] for one in found]) for loss in LOSSES}
    parents = np.maximum(shifted["plain"][:, 0], shifted["plain"][:, -1])
    rows = [
        finding("WiSE-FT over the better parent", shifted["plain"][:, 5] - parents, where="abstract", unit="points"),
        finding("BANG over WiSE-FT", shifted["both"][:, 5] - shifted["plain"][:, 5], where="abstract", unit="points"),
    ]
    return {"rows": rows, "arrays": {"shifted": shifted}, "protocol": found[0]["protocol"] | {"weights": backbone}}
