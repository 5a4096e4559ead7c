"""Hydra's branches, each alone and both: on an input that the layer ignores, on new labels, and on a transformer.

A network of three layers has learned to read digits from their upper halves; of the lower halves its first layer sees
nothing. Then either the labels are permuted, or the lower halves are all there is. The transformer is that of
:mod:`peftref.adapters.experiments.transfer`. The ``gpu`` size has a ViT-B/16 learn CIFAR-100, adapted on the layers of
the official VTAB configuration: attention output and last matrix of the MLP.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ...data import Split, load
from ...fitting import accuracy, train
from ..baselines.lora import LoRA
from ..core.injection import inject
from ..hydra import Hydra
from ._pieces import Claim, compare_pieces, cut_test, judged, protocol_of
from .at_scale import LARGE, record_large
from .transfer import LINEARS, shifted

__all__ = ["BRANCHES", "MINUTES", "NEEDS", "PRESETS", "half", "learn", "run", "upper_net"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": [0, 1], "train": 64, "test": 200, "lrs": [1e-2], "steps": 2, "half_steps": 3, "start_steps": 5},
    "cpu": {
        "seeds": [0, 1, 2],
        "train": 800,
        "test": None,
        "lrs": [3e-3, 1e-2],
        "steps": 60,
        "half_steps": 200,
        "start_steps": 300,
    },
    "gpu": {"large": LARGE},
}
MINUTES = {"smoke": 0.1, "cpu": 2, "gpu": 7}
NEEDS = {"gpu": ("cuda", "cifar100")}

BRANCHES = {"sequential": (0, 4), "parallel": (4, 0), "both": (2, 2)}  # r_par, r_seq
VTAB = r"(.*\.)?blocks\.\d+\.(attn\.proj|mlp\.fc2)"
TABLE = "vtab1k/README.md of the official code: mean of 19 tasks"
SMALL: dict[str, Callable[[nn.Module], object]] = {
    "LoRA": lambda net: inject(net, LoRA, LINEARS, r=4, lora_alpha=4),
    "parallel only": lambda net: inject(net, Hydra, LINEARS, r_par=4, r_seq=0),
    "sequential only": lambda net: inject(net, Hydra, LINEARS, r_par=0, r_seq=4),
    "Hydra": lambda net: inject(net, Hydra, LINEARS, r_par=2, r_seq=2),
}
CLAIMS = (
    Claim("transformer: Hydra - LoRA", "Hydra", "LoRA", TABLE, 2.0),
    Claim("transformer: both - parallel", "Hydra", "parallel only", "abstract"),
    Claim("transformer: both - sequential", "Hydra", "sequential only", "abstract"),
)
PLACES = {"labels permuted": "abstract", "lower halves": "ours"}  # lower halves are built against one branch
HALF_CLAIMS = {
    task: [Claim(f"{task}: both - {branch}", "both", branch, where) for branch in ("parallel", "sequential")]
    for task, where in PLACES.items()
}
BIG: dict[str, Callable[[nn.Module], object]] = {
    "LoRA": lambda net: inject(net, LoRA, VTAB, r=4, lora_alpha=4),
    "Hydra": lambda net: inject(net, Hydra, VTAB),
    "sequential only": lambda net: inject(net, Hydra, VTAB, r_par=0, r_seq=4),
}
BIG_CLAIMS = (
    Claim("ViT-B/16: Hydra - LoRA", "Hydra", "LoRA", TABLE, 2.0),
    Claim("ViT-B/16: both - sequential", "Hydra", "sequential only", "abstract"),
)


def run(
    each: Callable[..., Any], *, data: Path | None = None, large: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Both small experiments, or the large network.

    Args:
        each: of :func:`peftref.recording.record`.
        data: the reader's folder, for the large network.
        large: settings of the large network.
        settings: of the small ones.
    """
    if large:
        return record_large(each, BIG, BIG_CLAIMS, data, **large)
    task = cut_test(shifted("digits", settings["train"], settings["train"] // 4), settings["test"])
    options = {"seeds": settings["seeds"], "lrs": settings["lrs"], "steps": settings["steps"]}
    runs = compare_pieces(each, SMALL, task, **options)
    rows = []
    for branch in BRANCHES:
        rows += each(f"halves: {branch}", _half_runs, branch, settings)
    halves = pd.DataFrame(rows)
    found = judged(runs, *CLAIMS)
    for name, claims in HALF_CLAIMS.items():
        found += judged(halves[halves["task"] == name], *claims)
    arrays = {"transformer": runs.to_dict("list"), "halves": halves.to_dict("list")}
    protocol = protocol_of(load("mnist5k"), weights="pretrained_vit()", halves=load("digits").sha256)
    return {"rows": found, "arrays": arrays, "protocol": protocol}


def half(split: Split, lower: bool) -> Tensor:
    """Digits of 8 x 8 pixels as rows of 64, the upper or the lower half of which is left.

    Args:
        split: with images ``(N, 1, 8, 8)``.
        lower: which half.
    """
    x = split.x.clone().flatten(1)
    x[:, slice(0, 32) if lower else slice(32, 64)] = 0  # rows of eight pixels, from the top
    return x


def learn(net: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, seed: int = 0) -> nn.Module:
    """Train what is not frozen; the network itself.

    Args:
        net: trained in place.
        x: inputs.
        y: classes.
        lr: peak of the schedule.
        steps: updates.
        seed: of the batches.
    """
    train(net, x, y, lr=lr, steps=steps, clip=torch.inf, generator=torch.Generator().manual_seed(seed))
    return net


def upper_net(steps: int = 300) -> nn.Sequential:
    """A network of three layers that reads upper halves; its weights for the lower ones are zero, and stay so."""
    digits = load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    with torch.no_grad():
        first: Tensor = net[0].get_parameter("weight")
        first[:, 32:] = 0
    learn(net, half(digits.train, lower=False), digits.train.y, 3e-3, steps)
    return net


def _half_runs(branch: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    digits = load("digits")
    start = upper_net(settings["start_steps"])
    r_par, r_seq = BRANCHES[branch]
    rows = []
    for task in ("labels permuted", "lower halves"):
        lower = task == "lower halves"
        shift = 0 if lower else 3
        for seed in settings["seeds"]:
            net = copy.deepcopy(start)
            torch.manual_seed(seed)
            inject(net, Hydra, ["0", "2"], r_par=r_par, r_seq=r_seq)
            x = half(digits.train, lower)
            y = (digits.train.y + shift) % 10
            learn(net, x, y, 1e-2, settings["half_steps"], seed)
            score = accuracy(net(half(digits.test, lower)), (digits.test.y + shift) % 10)
            rows.append({"task": task, "method": branch, "seed": seed, "accuracy": score})
    return rows
