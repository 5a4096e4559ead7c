"""TLoRA on real changes of weights, and on a task.

The small vision transformer that knows clothes is fine-tuned as a whole, from three seeds, on 800 images of clothes
turned by 90 degrees. So there is a real ``W_* - W`` for each of its matrices, to which adapters are fitted (*weight
simulation*, as the paper does with two models of SDXL). Then adapters on the attention matrices learn the same task.
The ``gpu`` size has a ViT-B/16 learn CIFAR-100, at about equal numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ...data import load
from ...models.vit import pretrained_vit
from ..baselines.lora import LoRA
from ..core.injection import inject
from ..core.layers import view
from ..tlora import TLoRA, ring_matrix
from ._pieces import Claim, compare_pieces, cut_test, judged, protocol_of
from .at_scale import LARGE, record_large
from .transfer import LINEARS, Task, adapt, full, probe, shifted

__all__ = ["FITS", "LAYERS", "MINUTES", "NEEDS", "PRESETS", "RANKS", "best_lora", "run", "simulate"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": [0, 1], "train": 64, "test": 200, "full_steps": 2, "fit_steps": 3, "lrs": [1e-2], "steps": 2},
    "cpu": {
        "seeds": [0, 1, 2],
        "train": 800,
        "test": 1000,
        "full_steps": 60,
        "fit_steps": 150,
        "lrs": [1e-2, 3e-2],
        "steps": 50,
    },
    "gpu": {"large": LARGE},
}
MINUTES = {"smoke": 0.1, "cpu": 2, "gpu": 9}
NEEDS = {"gpu": ("cuda", "cifar100")}

ATTENTION = r"blocks\.\d+\.attn\.(qkv|proj)"
LAYERS = {"qkv": "blocks.1.attn.qkv", "fc1": "blocks.2.mlp.fc1", "fc2": "blocks.1.mlp.fc2"}
RANKS = [1, 2, 4]  # of the transform alone
LORA_RANKS = [0, 1, 2, 4, 5, 8, 16, 32]
FITS: dict[str, dict[str, Any]] = {
    "TR, R' = 4": {"transform_rank": 0, "residual_rank": 4},
    "T, R = 2": {"transform_rank": 2, "residual_rank": 0},
    "TLoRA(2, 4)": {"transform_rank": 2, "residual_rank": 4},
    "TLoRA*(1, 4)": {"transform_rank": 1, "residual_rank": 4, "residual": "lora"},
}
STARTS = {f"{init} start, R = {r}": (init, r) for init in ("paper", "slot") for r in RANKS}
SMALL: dict[str, Callable[[nn.Module], object]] = {
    "head only": probe,
    "LoRA, r = 4": lambda net: inject(net, LoRA, ATTENTION, r=4, lora_alpha=4),
    "slot": lambda net: inject(net, TLoRA, ATTENTION, transform_rank=2, residual_rank=2),
    "paper": lambda net: inject(net, TLoRA, ATTENTION, transform_rank=2, residual_rank=2, init="paper"),
}
SIMULATION = "Fig. 2: weight simulation, SDXL to SDXL-inpaint"
CLAIMS = (
    Claim("task: TLoRA(2, 2) - LoRA, r = 4", "slot", "LoRA, r = 4", "abstract"),
    Claim("task: slot - paper start", "slot", "paper"),
)


def _fit_claim(what: str, one: str, other: str, where: str = "ours") -> Claim:
    return Claim(what, one, other, where, None, "below", "left")


STAR = "TLoRA*(1, 4)"
RANK_4 = "best LoRA, r = 4"
RANK_5 = "best LoRA, r = 5"
FIT_CLAIMS = {
    "qkv": [
        _fit_claim("qkv: T before LoRA - one more rank", STAR, RANK_5),
        _fit_claim("qkv: T before LoRA - LoRA of the same rank", STAR, RANK_4, SIMULATION),
        _fit_claim("qkv: R = 4 - R = 1, start of Proposition 1", "paper start, R = 4", "paper start, R = 1"),
        _fit_claim("qkv: R = 4 - R = 1, slot start", "slot start, R = 4", "slot start, R = 1"),
        _fit_claim("qkv: slot - paper start, R = 4", "slot start, R = 4", "paper start, R = 4"),
    ],
    "fc2": [
        _fit_claim("fc2: T before LoRA - one more rank", STAR, RANK_5),
        _fit_claim("fc2: T before LoRA - LoRA of the same rank", STAR, RANK_4, SIMULATION),
    ],
}
BIG: dict[str, Callable[[nn.Module], object]] = {
    "LoRA, r = 4": lambda net: inject(net, LoRA, LINEARS, r=4, lora_alpha=4),
    "slot": lambda net: inject(net, TLoRA, LINEARS, transform_rank=2, residual_rank=4),
    "paper": lambda net: inject(net, TLoRA, LINEARS, transform_rank=2, residual_rank=4, init="paper"),
    "TLoRA*": lambda net: inject(net, TLoRA, LINEARS, transform_rank=2, residual_rank=4, residual="lora"),
}
BIG_CLAIMS = (
    Claim("ViT-B/16: TLoRA(2, 4) - LoRA, r = 4", "slot", "LoRA, r = 4", "abstract"),
    Claim("ViT-B/16: TLoRA*(2, 4) - LoRA, r = 4", "TLoRA*", "LoRA, r = 4", "abstract"),
    Claim("ViT-B/16: slot - paper start", "slot", "paper"),
)


def run(
    each: Callable[..., Any], *, data: Path | None = None, large: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Weight simulation and task, or the large network.

    Args:
        each: of :func:`peftref.recording.record`.
        data: the reader's folder, for the large network.
        large: settings of the large network.
        settings: of the small ones.
    """
    if large:
        return record_large(each, BIG, BIG_CLAIMS, data, **large)
    task = cut_test(shifted("rotated", settings["train"], settings["train"] // 4), settings["test"])
    fits = []
    curves: dict[str, list[list[float]]] = {name: [] for name in LAYERS}
    spectra = []
    for seed in settings["seeds"]:
        found = each(f"weight simulation, seed {seed}", _simulation, task, seed, settings)
        fits += found["fits"]
        spectra.append(found["spectra"])
        for name in LAYERS:
            curves[name].append(found["best_lora"][name])
    table = pd.DataFrame(fits)
    options = {"seeds": settings["seeds"], "lrs": settings["lrs"], "steps": settings["steps"]}
    runs = compare_pieces(each, SMALL, task, **options)
    rows = judged(runs, *CLAIMS)
    for name, claims in FIT_CLAIMS.items():
        rows += judged(table[table["layer"] == name], *claims)
    arrays = {
        "fits": table.to_dict("list"),
        "task": runs.to_dict("list"),
        "best_lora": curves,
        "spectra": {name: [found[name] for found in spectra] for name in spectra[0]},
    }
    return {"rows": rows, "arrays": arrays, "protocol": protocol_of(load("fashion8k"), weights="pretrained_vit()")}


def simulate(layer: nn.Module, target: Tensor, seed: int, steps: int = 150, **options: Any) -> tuple[float, TLoRA]:
    """An adapter fitted to a change of a weight: the share of its length that is left, in %, and the adapter.

    Args:
        layer: with the frozen weight.
        target: the change, of the weight's shape.
        seed: of the adapter.
        steps: of Adam.
        options: of :class:`~peftref.adapters.tlora.TLoRA`.
    """
    base = view(layer)
    torch.manual_seed(seed)
    adapter = TLoRA(base, **options)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        left = (adapter.delta(base)[0] - target).square().sum() / target.square().sum()
        optimizer.zero_grad()
        left.backward()
        optimizer.step()
        schedule.step()
    return 100 * left.item() ** 0.5, adapter


def best_lora(target: Tensor, r: int) -> float:
    """What the best update of rank ``r`` leaves of a change, as a share of its length in % (Eckart and Young).

    Args:
        target: the change of a weight.
        r: rank.
    """
    values = torch.linalg.svdvals(target)
    return 100 * float(values[r:].norm() / values.norm())


def _simulation(task: Task, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """All adapters fitted to one fine-tuning."""
    start = pretrained_vit()
    tuned = adapt(full, task, lr=3e-3, seed=seed, steps=settings["full_steps"]).model
    fits: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {}
    spectra: dict[str, list[float]] = {}
    for name, place in LAYERS.items():
        layer = start.get_submodule(place)
        W: Tensor = layer.get_parameter("weight").detach()
        target = tuned.get_submodule(place).get_parameter("weight").detach() - W
        curves[name] = [best_lora(target, r) for r in LORA_RANKS]
        wanted = dict(FITS)
        if name == "qkv":
            spectra["W* - W"] = torch.linalg.svdvals(target)[:32].tolist()
            wanted |= {k: {"transform_rank": r, "residual_rank": 0, "init": i} for k, (i, r) in STARTS.items()}
        for method, options in wanted.items():
            left, adapter = simulate(layer, target, seed, settings["fit_steps"], **options)
            count = sum(p.numel() for p in adapter.parameters())
            fits.append({"layer": name, "seed": seed, "method": method, "left": left, "trainable": count})
            if name == "qkv" and method in ("slot start, R = 2", "slot start, R = 4"):
                T = ring_matrix(list(adapter.A)).detach()
                rest = target - W @ (T - torch.eye(len(T)))
                spectra[f"after T, R = {STARTS[method][1]}"] = torch.linalg.svdvals(rest)[:32].tolist()
        for r in (4, 5):
            count = r * sum(W.shape)
            left = best_lora(target, r)
            fits.append(
                {"layer": name, "seed": seed, "method": f"best LoRA, r = {r}", "left": left, "trainable": count}
            )
        any_T = torch.linalg.lstsq(W, target, driver="gelsd").solution
        left = 100 * float((target - W @ any_T).norm() / target.norm())
        fits.append({"layer": name, "seed": seed, "method": "any T", "left": left, "trainable": W.shape[1] ** 2})
    return {"fits": fits, "best_lora": curves, "spectra": spectra}
