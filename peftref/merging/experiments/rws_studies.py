"""What the recorded run of the chapter on robust weight signatures measures, one family of networks at a time.

Each function takes the seed of a :func:`~peftref.merging.experiments.corrupted.family` and returns accuracies in %.
``every`` keeps one test image in so many (1: all 2,000); the sweeps take a quarter of those.

>>> sorted(by_depth(0, every=100))
['contrast', 'defocus_blur', 'fog', 'gaussian_noise', 'invert']
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from ...data import load
from ..baselines.arithmetic import wise_ft
from ..core.batchnorm import recalibrate
from ..core.loop import delta, merge
from ..core.patching import apply
from ..core.quantise import quantise
from ..core.units import first, units
from ..rws import average_batchnorm, blend_statistics, compose, signature
from . import rws_networks as made
from .corrupted import DOMAINS, accuracy, corrupted, deal, family
from .rws_networks import FOUR, GRID, RIVALS, build, held_out, layers, length, mixture, networks, rho, score

SHARES = [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]  # b of eq-rws-line
STRENGTHS = [0.0, 0.5, 1.0, 1.25, 1.5]
LEVELS = [2, 4, 6, 8, 16, 32, 256]
MIXES = {
    "contrast + noise": ["contrast", "gaussian_noise"],
    "blur + noise": ["defocus_blur", "gaussian_noise"],
    "all four": FOUR,
}
Accuracies = dict[str, Any]


def trained_on(seed: int, every: int) -> Accuracies:
    """Each network of the family on each kind of image; and the clean one with the signature in full."""
    states = networks(seed)[1]
    every_kind = ["clean", *DOMAINS]
    found = {row: {name: score(seed, states[row], name, every) for name in every_kind} for row in every_kind}
    patched = {name: score(seed, apply(states["clean"], rho(seed, name)), name, every) for name in DOMAINS}
    return {"networks": found, "patched": patched}


def grid_search(seed: int, count: int, thin: int) -> dict[str, list[list[float]]]:
    """Corrupted and clean accuracy on validation images, for each ``thin``-th setting of the grid."""
    model = networks(seed)[0]
    held = held_out(seed, count)
    found: dict[str, list[list[float]]] = {}
    for name in DOMAINS:
        seen = corrupted(held, name, seed=1)
        built = [build(seed, name, *at) for at in GRID[::thin]]
        found[name] = [[accuracy(model, state, images) for images in (seen, held)] for state in built]
    return found


def compare(seed: int, best: Mapping[str, Mapping[str, Sequence[float]]], every: int) -> Accuracies:
    """Corrupted and clean accuracy of each method at its chosen setting, and of the two networks it is made of."""
    states = networks(seed)[1]
    found: Accuracies = {}
    for name in DOMAINS:
        built = {m: build(seed, name, m, int(best[m][name][0]), best[m][name][1]) for m in RIVALS}
        strength = best["signature"][name][1]
        built["clean network"] = states["clean"]
        built["robust network"] = states[name]
        built["one projection"] = apply(states["clean"], compose([made.one_projection(seed, name)], strength=strength))
        headed = signature(states["start"], states["clean"], states[name], list(states["clean"]))
        built["with the head"] = apply(states["clean"], compose([headed], strength=strength))
        found[name] = {
            m: [score(seed, state, images, every) for images in (name, "clean")] for m, state in built.items()
        }
    return found


def along_the_line(seed: int, every: int) -> Accuracies:
    """Accuracy against the share b of the clean path that is subtracted, and of the signature; mean of four."""
    states = networks(seed)[1]
    names = first(layers(seed), 5)
    tau_s = delta(states["clean"], states["start"], names)
    found: list[list[list[float]]] = []
    for name in FOUR:
        tau_c = delta(states[name], states["start"], names)
        patches = [{n: tau_c[n] - b * tau_s[n] for n in names} for b in SHARES]  # eq-rws-line
        patched = [apply(states["clean"], patch) for patch in (*patches, rho(seed, name))]
        found.append([[score(seed, state, images, 4 * every) for images in (name, "clean")] for state in patched])
    mean = torch.tensor(found).mean(0).tolist()
    return {"line": mean[:-1], "signature": mean[-1]}


def by_depth(seed: int, every: int) -> Accuracies:
    """Accuracy on each corruption with the signature in the first 0 to 5 layers."""
    clean = networks(seed)[1]["clean"]
    return {
        name: [score(seed, apply(clean, rho(seed, name, k)), name, 4 * every) for k in range(6)] for name in DOMAINS
    }


def by_strength(seed: int, every: int) -> Accuracies:
    """Accuracy against strength: signature, plain difference, and the latter as short as the former; mean of four."""
    clean = networks(seed)[1]["clean"]
    found: dict[str, list[list[list[float]]]] = {"signature": [], "difference": [], "short": []}
    for name in FOUR:
        signed = rho(seed, name)
        plain = rho(seed, name, project=False)
        short = compose([plain], strength=length(signed) / length(plain))
        for kind, patch in zip(found, (signed, plain, short), strict=True):
            states = [apply(clean, compose([patch], strength=a)) for a in STRENGTHS]
            found[kind].append([[score(seed, s, images, 4 * every) for images in (name, "clean")] for s in states])
    return {kind: torch.tensor(values).mean(0).tolist() for kind, values in found.items()}


def mixture_search(seed: int, count: int) -> dict[str, list[float]]:
    """Mean validation accuracy of each mixture over its corruptions, for the strengths 1, 1.5 and 2."""
    model = networks(seed)[0]
    held = held_out(seed, count)
    seen = {name: corrupted(held, name, seed=1) for name in FOUR}
    found: dict[str, list[float]] = {}
    for label, mix in MIXES.items():
        states = [mixture(seed, mix, a) for a in (1.0, 1.5, 2.0)]
        found[label] = [sum(accuracy(model, state, seen[n]) for n in mix) / len(mix) for state in states]
    return found


def mixtures(seed: int, strengths: Mapping[str, float], every: int) -> Accuracies:
    """Accuracy on clean images and on each corruption with one signature, and with several at once."""
    mixes = {"none": [], "contrast": ["contrast"], "noise": ["gaussian_noise"], **MIXES}
    states = {label: mixture(seed, mix, strengths.get(label, 1.0)) for label, mix in mixes.items()}
    return {m: {n: score(seed, state, n, every) for n in ("clean", *FOUR)} for m, state in states.items()}


def stored(seed: int, every: int) -> Accuracies:
    """Accuracy with the signature in few levels, mean of contrast and noise, and how much longer the patch becomes."""
    clean = networks(seed)[1]["clean"]
    names = ("contrast", "gaussian_noise")
    exact = {name: rho(seed, name) for name in names}
    found: Accuracies = {"exact": _mean(score(seed, apply(clean, exact[n]), n, 4 * every) for n in names)}
    for kind in ("linear", "tanh", "log"):
        coarse = [{n: quantise(exact[n], q, kind).dequantise() for n in names} for q in LEVELS]
        found[kind] = [_mean(score(seed, apply(clean, at[n]), n, 4 * every) for n in names) for at in coarse]
        found[f"{kind}, length"] = [_mean(length(at[n]) / length(exact[n]) for n in names) for at in coarse]
    return found


def transfer(seed: int, every: int, data: str) -> Accuracies:
    """The contrast signature on a host trained on digits (``data``), and on two hosts of clothes."""
    states = networks(seed)[1]
    other = networks((seed + 1) % 5)[1]["clean"]
    digits = {"host": states["digits"], "robust network": states["digits contrast"]}
    for kind, k in product(("signature", "difference"), (1, 3, 5)):
        patch = rho(seed, "contrast", k, project=kind == "signature")
        digits[f"{kind}, K = {k}"] = apply(states["digits"], patch)
    three = rho(seed, "contrast", 3)
    clothes = {"other start": other, "other start, signature, K = 3": apply(other, three)}
    clothes["own host"] = states["clean"]
    clothes["own host, signature, K = 3"] = apply(states["clean"], three)
    kinds = ("clean", "contrast")
    found = {m: {n: score(seed, state, n, every, data) for n in kinds} for m, state in digits.items()}
    return found | {m: {n: score(seed, state, n, every) for n in kinds} for m, state in clothes.items()}


def far_start(seed: int, every: int) -> Accuracies:
    """Starts that learned digits only, fine-tuned on clean and on low-contrast clothes with a new head."""
    states = networks(seed)[1]
    start, clean, robust = (states[f"far {name}"] for name in ("start", "clean", "contrast"))
    built = {"clean network": clean, "robust network": robust}
    for kind, k in product(("signature", "difference"), (1, 3, 5)):
        patch = signature(start, clean, robust, first(layers(seed), k), project=kind == "signature")
        built[f"{kind}, K = {k}"] = apply(clean, patch)
    built["WiSE-FT, 0.75"] = merge(clean, [robust], wise_ft(0.75))
    return {m: {n: score(seed, state, n, every) for n in ("contrast", "clean")} for m, state in built.items()}


def with_batchnorm(seed: int, every: int) -> Accuracies:
    """Low contrast, networks with BatchNorm: patch, statistics and BatchNorm's own tensors, each with and without."""
    model, states = family(seed, "norm")
    tune = deal(load("fashion8k").train, seed)["tune"]
    seen = corrupted(tune, "contrast", seed=2).x.split(250)
    start, clean, robust = (states[name] for name in ("start", "clean", "contrast"))
    trial = {"robust network": made.loaded(model, robust)}
    for label, project in (("no patch", None), ("signature", True), ("difference", False)):
        chosen = [] if project is None else first(units(model), 5)
        patch = signature(start, clean, robust, chosen, project=bool(project))
        trial[label] = made.loaded(model, apply(clean, patch))
        trial[f"{label}, statistics"] = recalibrate(copy.deepcopy(trial[label]), seen)
        averaged = made.loaded(model, average_batchnorm(trial[label], [robust]))
        trial[f"{label}, BatchNorm averaged"] = copy.deepcopy(averaged)
        trial[f"{label}, both"] = blend_statistics(averaged, seen, strength=1.0)
    return {
        m: {n: accuracy(net, {}, made.test_images(n, every)) for n in ("contrast", "clean")} for m, net in trial.items()
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
