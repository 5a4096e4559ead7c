"""The recorded run of the chapter on robust weight signatures.

``cpu``: the five shipped families of small networks on Fashion-MNIST (:mod:`.rws_studies`). ``t4`` and ``gpu``: a
VGG-16 pretrained on ImageNet, fine-tuned on CIFAR-10 (:mod:`.rws_at_scale`), with fewer corruptions and epochs than the
15 and 50 of the official code, which take hours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data import load
from ...results import finding
from . import rws_studies as studies
from .corrupted import DOMAINS
from .rws_at_scale import cifar_start, run_at_scale
from .rws_networks import FOUR, GRID, LINE, PARTS, RIVALS, change_per_entry, relative_change
from .rws_studies import MIXES

THREE = ["gaussian_noise", "defocus_blur", "contrast"]
SIX = [*THREE, "fog", "pixelate", "jpeg_compression"]
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": [0, 1], "normed": [0], "every": 100, "held": 5, "thin": 5, "digits": "fashion8k"},
    "cpu": {"seeds": [0, 1, 2, 3, 4], "normed": [0, 1, 2], "every": 1, "held": 400, "thin": 1, "digits": "mnist5k"},
    "t4": {"backbone": "vgg16.tv_in1k", "domains": THREE, "depths": [1, 3, 7, 13], "epochs": 10},
    "gpu": {"backbone": "vgg16.tv_in1k", "domains": SIX, "depths": [1, 3, 5, 7, 13], "epochs": 20},
}
MINUTES = {"smoke": 0.05, "cpu": 4, "t4": 40, "gpu": 10}
NEEDS = {"t4": ("cuda", "vision", "cifar10"), "gpu": ("cuda", "vision", "cifar10")}
Each = Callable[..., Any]
Array = NDArray[Any]


def run(each: Each, *, data: Path | None = None, **settings: Any) -> dict[str, Any]:
    """The families, or, given a ``backbone``, that."""
    if "backbone" in settings:
        return _large(each, data, **settings)
    return _families(each, **settings)


def _families(
    each: Each, seeds: Sequence[int], normed: Sequence[int], every: int, held: int, thin: int, digits: str
) -> dict[str, Any]:
    def per_seed(study: Callable[..., Any], *arguments: Any, over: Sequence[int] = seeds) -> list[Any]:
        return [each(f"{study.__name__}, {seed}", study, seed, *arguments) for seed in over]

    searched = per_seed(studies.grid_search, held, thin)
    best = _chosen(searched, GRID[::thin])
    mixed = per_seed(studies.mixture_search, held)
    strengths = {m: (1.0, 1.5, 2.0)[int(np.argmax(np.sum([found[m] for found in mixed], 0)))] for m in MIXES}
    arrays = {
        "trained_on": per_seed(studies.trained_on, every),
        "compared": per_seed(studies.compare, best, every),
        "line": per_seed(studies.along_the_line, every),
        "depth": per_seed(studies.by_depth, every),
        "strength": per_seed(studies.by_strength, every),
        "mixtures": per_seed(studies.mixtures, strengths, every),
        "stored": per_seed(studies.stored, every),
        "transfer": per_seed(studies.transfer, every, digits),
        "far": per_seed(studies.far_start, every),
        "batchnorm": per_seed(studies.with_batchnorm, every, over=normed),
        "change": per_seed(relative_change),
        "change per entry": per_seed(change_per_entry),
    }
    source = load("fashion8k")
    hosts = load(digits)
    protocol = {
        "data": {source.name: source.sha256, hosts.name: hosts.sha256},
        "weights": "the shipped families",
        "tuned": "for each corruption on validation images, mean of corrupted and clean accuracy over the families",
        "chosen": best,
        "mixture strengths": strengths,
    }
    return {"rows": _rows(arrays), "arrays": arrays, "protocol": protocol}


def _chosen(
    searched: Sequence[dict[str, Any]], grid: Sequence[tuple[str, int, float]]
) -> dict[str, dict[str, list[float]]]:
    """For each method and corruption the layers and strength with the best mean of corrupted and clean accuracy."""
    best: dict[str, dict[str, list[float]]] = {method: {} for method in RIVALS}
    for name in DOMAINS:
        mean = np.mean([found[name] for found in searched], axis=(0, 2))  # (settings,)
        for method in RIVALS:
            at = max((i for i, setting in enumerate(grid) if setting[0] == method), key=mean.__getitem__)
            best[method][name] = [grid[at][1], grid[at][2]]
    return best


def _rows(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    def mean(method: str, column: str) -> Array:
        """Of the four standard corruptions, one value a family."""
        pairs = np.array([[found[name][method] for name in FOUR] for found in arrays["compared"]]).mean(1)
        chosen: Array = pairs.mean(1) if column == "both" else pairs[:, ["corrupted", "clean"].index(column)]
        return chosen

    def compared(what: str, a: str, b: str, column: str, where: str = "ours") -> dict[str, Any]:
        first = mean(a, column)
        second = mean(b, column)
        level = {a: first.mean(), b: second.mean()}
        return finding(what, (first - second).tolist(), where=where, unit="points", level=level)

    def changed(what: str, key: str, unit: str) -> dict[str, Any]:
        """The abstract says that weights mostly differ in shallow layers, and not in what unit."""
        by_layer = np.array(arrays[key])[:, : len(FOUR)].mean(1)  # (families, layers)
        return finding(
            f"weights change most in shallow layers: layer 1 over layer 5, {what}",
            (by_layer[:, 0] - by_layer[:, 4]).tolist(),
            where="abstract, observation 1, which names no unit",
            unit=unit,
            level={"layer 1": by_layer[:, 0].mean(), "layer 5": by_layer[:, 4].mean()},
        )

    gained = [found["signature, K = 3"]["contrast"] - found["host"]["contrast"] for found in arrays["transfer"]]
    mixed = [np.mean([m["all four"][n] - m["none"][n] for n in FOUR]) for m in arrays["mixtures"]]
    fog = [
        np.mean([t["networks"]["fog"][n] - m["all four"][n] for n in FOUR])
        for t, m in zip(arrays["trained_on"], arrays["mixtures"], strict=True)
    ]
    coarse = [found["linear"][studies.LEVELS.index(16)] - found["exact"] for found in arrays["stored"]]
    return [
        compared("adding works: corrupted images", "signature", "clean network", "corrupted", "abstract"),
        compared(
            "the projection isolates robustness: signature over plain difference, mean of corrupted and clean",
            "signature",
            "plain difference",
            "both",
        ),
        compared("robustness is shallow: first over last three layers", *PARTS, "both"),
        changed("relative change", "change", "%"),
        changed("change per entry", "change per entry", "thousandths"),
        finding("signatures add up: all four at once, corrupted images", mixed, where="abstract", unit="points"),
        finding("transfers: low-contrast digits, three layers", gained, where="abstract", unit="points"),
        compared("signature over task vector, both", LINE[0], LINE[2], "both"),
        compared("signature over WiSE-FT, corrupted", "signature", "WiSE-FT", "corrupted"),
        compared("signature over WiSE-FT, clean", "signature", "WiSE-FT", "clean"),
        compared("signature over the robust network, both", "signature", "robust network", "both"),
        compared("signature over the clean network, clean", "signature", "clean network", "clean"),
        compared("one projection over one for each tensor, corrupted", "one projection", "signature", "corrupted"),
        compared("the head in the patch, corrupted", "with the head", "signature", "corrupted"),
        compared("WiSE-FT over signature with the head, corrupted", "WiSE-FT", "with the head", "corrupted"),
        finding("the fog network over all four signatures, corrupted", fog, where="ours", unit="points"),
        finding("16 levels over float32, contrast and noise", coarse, where="ours", unit="points"),
    ]


def _large(
    each: Each, data: Path | None, backbone: str, domains: list[str], depths: list[int], epochs: int
) -> dict[str, Any]:
    def accuracies() -> dict[str, Any]:
        cifar = load("cifar10", data)
        table = run_at_scale(cifar_start(backbone), cifar, domains, depths, epochs=epochs)
        rows = {", ".join(key): values for key, values in zip(table.index, table.to_numpy().tolist(), strict=True)}
        return {"rows": rows, "protocol": table.attrs["protocol"]}

    found = each("accuracies", accuracies)
    level = {network: [found["rows"][f"{d}, {network}"][1] for d in domains] for network in _networks(depths)}
    rows = []
    for k in depths:
        for other in ("clean", f"difference, K = {k}"):
            pairs = zip(level[f"signature, K = {k}"], level[other], strict=True)
            rows.append(
                finding(
                    f"signature over {other}, first {k} layers, corrupted images (one value a corruption)",
                    [a - b for a, b in pairs],
                    where="abstract" if other == "clean" else "ours",
                    unit="points",
                )
            )
    return {"rows": rows, "arrays": {"corrupted": level}, "protocol": found["protocol"] | {"weights": backbone}}


def _networks(depths: Sequence[int]) -> list[str]:
    return ["clean", *(f"{kind}, K = {k}" for k in depths for kind in ("signature", "difference")), "robust"]
