r"""LAME on photographs: what decides is how many classes a batch spans.

EfficientNet-Lite0 with its ImageNet classifier, restricted to the 200 classes of Tiny-ImageNet, meets validation
photographs, clean and corrupted. A seed has 100 of the classes with 16 photographs each, and no photograph is in two
seeds. The photographs come in *runs* of :math:`L` of one class, the runs in random order: :math:`L=1` is the iid
stream, :math:`L=16` is sorted by class. A batch of :math:`N` then holds about :math:`N/L` classes, and every order has
the same photographs. LAME sees only outputs, so a domain costs one pass of the network and all orders are solved from
it; BN-adapt and TENT run the network again for each order, and do so in one domain. TENT's learning rate is the best of
several on other photographs of that domain, in random order.

The size ``smoke`` is the same on the embedded garments; ``t4`` and ``gpu`` are the published backbones on ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data import sorted_by_class
from ...data.domains import generator_for
from ...models import from_timm
from ...results import finding
from ..baselines.tent import Tent
from ..lame import LAME
from ._lame_pieces import KINDS, LENGTH, ONLINE, deal, in_runs, load_images, online, ordered, shifted, solve
from .at_scale import imagenet_folder, run_at_scale

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "images": "fashion8k",
        "side": 28,
        "seeds": 2,
        "domains": [["gaussian_noise", 3]],
        "ablated": ["gaussian_noise"],
        "online": [["gaussian_noise", 3]],
        "choice_images": 64,
        "lengths": [1, 4, 16],
        "batches": [16, 32],
        "rates": [1e-3],
    },
    "cpu": {
        "images": "tiny_imagenet",
        "side": 96,
        "seeds": 5,
        "domains": [
            ["clean", 1],
            ["gaussian_noise", 1],
            ["fog", 3],
            ["contrast", 3],
        ],
        "ablated": ["clean", "gaussian_noise"],
        "online": [["gaussian_noise", 1]],
        "choice_images": 800,
        "lengths": [1, 2, 4, 8, 16],
        "batches": [16, 64],
        "rates": [3e-4, 1e-3, 3e-3, 1e-2],
    },
    "t4": {
        "backbone": "resnet50.a1_in1k",
        "limit": 2000,
        "corruptions": ["gaussian_noise", "pixelate"],
        "seeds": 2,
        "where": "ours",
        "paper": None,
    },
    "gpu": {
        "backbone": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "limit": 5000,
        "corruptions": ["gaussian_noise", "defocus_blur", "snow", "contrast", "pixelate"],
        "seeds": 2,
        "where": "public benchmark, all corruptions",
        "paper": 16.1,
    },
}
MINUTES = {"smoke": 0.05, "cpu": 25, "t4": 10, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": ("vision", "tiny_imagenet"),
    "t4": ("cuda", "vision", "imagenet"),
    "gpu": ("cuda", "vision", "imagenet"),
}


def run(each: Any, *, data: Path | None = None, **settings: Any) -> dict[str, Any]:
    """The experiment; see :mod:`peftref.results`."""
    return _published(each, data, **settings) if "backbone" in settings else _photographs(each, data, **settings)


def _photographs(each: Any, data: Path | None, **settings: Any) -> dict[str, Any]:
    seeds = settings["seeds"]
    torch.set_num_threads(1)
    x, y, net = load_images(settings["images"], settings["side"], data)
    small = settings["batches"][0]  # the published size
    share = 2 if len(y.unique()) > 10 else 1
    *streams, choice = deal(y, seeds, share)
    orders = [str(length) for length in settings["lengths"]] + ["Dirichlet"]
    solved = {
        name: each(f"LAME, {name} {severity}", solve, net, x, y, streams, name, severity, settings)
        for name, severity in settings["domains"]
    }
    errors = {key: value for found in solved.values() for key, value in found["errors"].items()}
    rate: dict[str, float] = {}
    for name, severity in settings["online"]:
        images = x.clone()
        for used in (torch.cat([rows.flatten() for rows in streams]), choice.flatten()):
            images[used] = shifted(x[used], name, severity)  # the same noise as above
        rows = in_runs(choice, 1, generator_for("choice"))[: settings["choice_images"]]
        for r in settings["rates"]:
            rate[f"{r:g}"] = each(f"choice, {name}, {r:g}", online, Tent(net, r), images, y, rows, small)
        best = float(min(rate, key=lambda r: rate[r]))
        for method, wrap in ONLINE.items():
            for length in (1, LENGTH):
                key = f"{method}, {name}, {small}, {length}"
                errors[key] = [
                    each(f"{key}, seed {seed}", online, wrap(net, best), images, y, ordered(y, at, length, seed), small)
                    for seed, at in enumerate(streams)
                ]
    return {
        "rows": _rows(errors, settings),
        "arrays": {
            "errors": errors,
            "classes": next(iter(solved.values()))["classes"],
            "votes": {key: value for found in solved.values() for key, value in found["votes"].items()},
            "orders": orders,
        },
        "protocol": {
            "network": "EfficientNet-Lite0, ImageNet" if share == 2 else "pretrained('fashion8k', 0)",
            "classes of the classifier": len(y.unique()),
            "classes in a stream": len(streams[0]),
            "images in a stream": streams[0].numel(),
            "corruption table": "cifar",
            "reset": "before each stream",
            "TENT": {"optimiser": "Adam", "error by rate, iid, other images": rate},
        },
    }


def _rows(errors: Mapping[str, list[float]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gains over the source in points of error: LAME averaged over the domains, the others under noise."""
    small, large = settings["batches"]

    def row(method: str, n: int, order: int | str, **options: Any) -> dict[str, Any]:
        live = method in ONLINE
        keys = [f"{name}, {n}, {order}" for name, _ in settings["online" if live else "domains"]]
        source = np.array([errors[f"source, {key}"] for key in keys])  # (domains, seeds)
        ours = np.array([errors[f"{method}, {key}"] for key in keys])
        title = {LENGTH: "class-sorted", "Dirichlet": "Dirichlet 0.1", 1: "iid"}[order]
        name = method if live else f"LAME {method}"
        what = f"{name}, batch {n}, {title}: gain over the source"
        level = {"source": float(source.mean()), name: float(ours.mean())}
        return finding(what, list((source - ours).mean(0)), unit="points", level=level, **options)

    by_class = {"where": "Fig. 2, by class", "paper": 16.0}
    iid = {"where": "Fig. 2, iid", "paper": 0.0, "claim": "paper"}
    harm = {"where": "abstract", "claim": "below"}
    rows = [
        row("rbf", small, LENGTH, **by_class),
        row("rbf", small, 1, **iid),
        row("BN-adapt", small, LENGTH, **harm),
        row("TENT", small, LENGTH, **harm),
        row("BN-adapt", small, 1, where="ours"),
        row("TENT", small, 1, where="ours"),
    ]
    for kind in KINDS:
        for n in (small, large):
            orders = ("Dirichlet",) if (kind, n) == ("rbf", small) else (LENGTH, "Dirichlet", 1)
            rows += [row(kind, n, order, where="ours") for order in orders]
    return rows


def _published(each: Any, data: Path | None, **settings: Any) -> dict[str, Any]:
    """ImageNet-C made on the fly, severity 5, class-sorted, batches of 64: the source, TENT and LAME."""
    model = from_timm(settings["backbone"], pretrained=True)
    if data is None:
        raise ValueError("data: expected the folder that holds imagenet, one folder of images per class, got None")
    photographs = imagenet_folder(data / "imagenet", limit=settings["limit"])
    methods = {"source": lambda net: net, "TENT": lambda net: Tent(net, 2.5e-4, _sgd)}
    methods |= {"LAME": lambda net: LAME(net, "rbf")}

    def errors(name: str, seed: int) -> dict[str, float]:
        table = run_at_scale(methods, model, photographs, [name], 5, 64, sorted_by_class, seed=seed)
        return {method: float(table[method].iloc[0]) for method in methods}

    found = [
        [each(f"{name}, seed {seed}", errors, name, seed) for name in settings["corruptions"]]
        for seed in range(settings["seeds"])
    ]
    mean = {method: [float(np.mean([row[method] for row in rows])) for rows in found] for method in methods}
    gains = {method: list(np.subtract(mean["source"], mean[method])) for method in ("TENT", "LAME")}
    level = {method: float(np.mean(values)) for method, values in mean.items()}
    paper = {"where": settings["where"], "paper": settings["paper"]}
    rows = [
        finding(
            "LAME, class-sorted ImageNet-C: gain over the source", gains["LAME"], unit="points", level=level, **paper
        ),
        finding(
            "TENT, class-sorted ImageNet-C: gain over the source",
            gains["TENT"],
            unit="points",
            level=level,
            where="abstract",
            claim="below",
        ),
    ]
    return {"rows": rows, "arrays": {"error": mean}, "protocol": {"severity": 5, "batch": 64, "order": "class-sorted"}}


def _sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)
