r"""Bone taken apart: what its guide :math:`W_{ab}B_a` and its translation :math:`B_a` contribute.

Two tasks. A small vision transformer that knows clothes learns handwritten digits from 800 images, with every matrix of
its blocks adapted; and a network of three layers with larger entries, trained on upright digits, learns turned ones.
The ``gpu`` size has a ViT-B/16 learn CIFAR-100, with LoRA of rank 32 and blocks of 64, which are about equal in size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import load
from ...fitting import accuracy, train
from ..baselines.lora import LoRA
from ..bone import Bone, bat
from ..core.adapter import Adapter
from ..core.injection import adapters, inject
from ..core.layers import Layer, view
from ._pieces import Claim, compare_pieces, cut_test, judged, protocol_of
from .at_scale import LARGE, record_large
from .transfer import LINEARS, adapt, shifted

__all__ = ["MINUTES", "NEEDS", "PRESETS", "Guide", "Shuffled", "run"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": [0, 1], "train": 40, "test": 100, "lrs": [1e-2], "steps": 1}
    | {"turned_lrs": [3e-2], "turned_steps": 3, "upright_steps": 5},
    "cpu": {
        "seeds": [0, 1, 2],
        "train": 800,
        "test": None,
        "lrs": [3e-3, 1e-2, 3e-2],
        "steps": 100,
        "turned_lrs": [1e-2, 3e-2, 1e-1],
        "turned_steps": 200,
        "upright_steps": 300,
    },
    "gpu": {"large": LARGE},
}
MINUTES = {"smoke": 0.1, "cpu": 4, "gpu": 8}
NEEDS = {"gpu": ("cuda", "cifar100")}

LORA = "LoRA, r = 4"
BAT = "Bat"
GUIDE = "guide alone"
POOLED = "pooled Bone"
SHUFFLED = "shuffled guide"
LAYER = "blocks.0.attn.qkv"  # whose spectrum is kept


class Guide(Bone):
    """The guide alone, ``dW_ab = W_ab B_a``, without the translation ``B_a``."""

    kind = "bone_guide"

    def read(self, base: Layer) -> Tensor:
        """The matrix that guides."""
        return base.weight

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return F.linear(x, self.delta(base)[0])

    def delta(self, base: Layer) -> tuple[Tensor, Tensor | None]:
        return bat(self.read(base), self.miss_block) - bat(0 * base.weight, self.miss_block), None


class Shuffled(Guide):
    """A guide that is the frozen weight with its entries in another order."""

    kind = "bone_shuffled"

    def read(self, base: Layer) -> Tensor:
        order = torch.randperm(base.weight.numel(), generator=torch.Generator().manual_seed(0))
        return base.weight.flatten()[order].view_as(base.weight)


TABLE = "table of the first version: GSM8K, LLaMA2-7B"
CLAIMS = (
    Claim("transformer: Bat - LoRA", BAT, LORA, TABLE, 10.39),
    Claim("transformer: Bat - pooled Bone", BAT, POOLED),
    Claim("transformer: guide alone - Bat", GUIDE, BAT),
    Claim("transformer: shuffled guide - guide alone", SHUFFLED, GUIDE),
)
KINDS: dict[str, tuple[type[Bone], dict[str, Any]]] = {
    POOLED: (Bone, {"variant": "bone"}),
    BAT: (Bone, {}),
    GUIDE: (Guide, {}),
}
TURNED_CLAIMS = (
    Claim("three layers: Bat - pooled Bone", BAT, POOLED),
    Claim("three layers: guide alone - Bat", GUIDE, BAT),
)
SMALL: dict[str, Callable[[nn.Module], object]] = {
    LORA: lambda net: inject(net, LoRA, LINEARS, r=4, lora_alpha=4),
    BAT: lambda net: inject(net, Bone, LINEARS, r=8),
    GUIDE: lambda net: inject(net, Guide, LINEARS, r=8),
    POOLED: lambda net: inject(net, Bone, LINEARS, r=8, variant="bone"),
    SHUFFLED: lambda net: inject(net, Shuffled, LINEARS, r=8),
}
BIG: dict[str, Callable[[nn.Module], object]] = {
    "LoRA, r = 32": lambda net: inject(net, LoRA, LINEARS, r=32, lora_alpha=32),
    BAT: lambda net: inject(net, Bone, LINEARS),
    POOLED: lambda net: inject(net, Bone, LINEARS, variant="bone"),
    GUIDE: lambda net: inject(net, Guide, LINEARS),
}
BIG_CLAIMS = (
    Claim("ViT-B/16: Bat - LoRA", BAT, "LoRA, r = 32", TABLE, 10.39),
    Claim("ViT-B/16: Bat - pooled Bone", BAT, POOLED),
    Claim("ViT-B/16: guide alone - Bat", GUIDE, BAT),
)


def run(
    each: Callable[..., Any], *, data: Path | None = None, large: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Both tasks, or the large network.

    Args:
        each: of :func:`peftref.recording.record`.
        data: the reader's folder, for the large network.
        large: settings of the large network.
        settings: of the small ones.
    """
    if large:
        return record_large(each, BIG, BIG_CLAIMS, data, **large)
    task = cut_test(shifted("digits", settings["train"], settings["train"] // 4), settings["test"])
    runs = compare_pieces(each, SMALL, task, seeds=settings["seeds"], lrs=settings["lrs"], steps=settings["steps"])
    chosen = runs.groupby("method").lr.first()
    parts = {
        name: each(f"parts of {name}", _parts_of_one, SMALL[name], task, chosen[name], settings["steps"])
        for name in (BAT, POOLED, GUIDE)
    }
    turned = pd.DataFrame(sum((each(f"turned: {name}", _turned, name, settings) for name in KINDS), []))
    rows = judged(runs, *CLAIMS) + judged(turned, *TURNED_CLAIMS)
    arrays = {
        "transformer": runs.to_dict("list"),
        "three layers": turned.to_dict("list"),
        "strength": parts[BAT]["strength"],
        "spectra": {name: parts[name]["spectrum"] for name in parts},
    }
    return {"rows": rows, "arrays": arrays, "protocol": protocol_of(load("mnist5k"), weights="pretrained_vit()")}


@torch.no_grad()
def strength_of(adapter: Adapter, base: Layer) -> tuple[float, float, float]:
    """Of one Bat: sigma sqrt(r), guide over translation, and the r largest directions' share of the update in %."""
    block: Tensor = adapter.get_parameter("miss_block")
    r = block.shape[-1]
    translation = bat(0 * base.weight, block)
    dW = bat(base.weight, block)
    energy = torch.linalg.svdvals(dW).square()
    predicted = base.weight.square().mean().sqrt() * r**0.5
    measured = (dW - translation).norm() / translation.norm()
    return float(predicted), float(measured), float(100 * energy[:r].sum() / energy.sum())


def _parts_of_one(build: Callable[[nn.Module], object], task: Any, lr: float, steps: int) -> dict[str, Any]:
    """Of one trained network: the strength of its guide by layer, and the spectrum of one update."""
    model = adapt(build, task, lr=lr, seed=0, steps=steps).model
    found = adapters(model)
    bases = {name: view(model.get_submodule(name).get_submodule("base_layer")) for name in found}
    bats = {name: a for name, a in found.items() if type(a) is Bone and a.variant == "bat"}
    values = torch.linalg.svdvals(found[LAYER].delta(bases[LAYER])[0].detach())
    return {
        "strength": {name: strength_of(adapter, bases[name]) for name, adapter in bats.items()},
        "spectrum": torch.where(values > 1e-5 * values[0], values / values[0], 0.0),
    }


def _turned(name: str, settings: dict[str, Any]) -> list[Any]:
    """The network of three layers: 400 turned digits to learn from, 300 to choose the learning rate by."""
    kind, options = KINDS[name]
    start = upright_net(settings["upright_steps"])
    digits = load("digits")
    x = _turn(digits.train.x)
    y = digits.train.y
    test = _turn(digits.test.x)

    def fitted(lr: float, seed: int) -> nn.Module:
        net = copy.deepcopy(start)
        inject(net, kind, ["0", "2"], r=8, **options)
        return _learn(net, x[:400], y[:400], lr, settings["turned_steps"], seed)

    def score(lr: float) -> float:
        return accuracy(fitted(lr, 1000)(x[400:700]), y[400:700])

    lr = max(settings["turned_lrs"], key=score)
    return [
        {"method": name, "seed": seed, "lr": lr, "accuracy": accuracy(fitted(lr, seed)(test), digits.test.y)}
        for seed in settings["seeds"]
    ]


def upright_net(steps: int = 300) -> nn.Sequential:
    """The network of three layers, trained on upright digits."""
    digits = load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    _learn(net, digits.train.x.flatten(1), digits.train.y, 3e-3, steps, 0)
    return net


def _turn(x: Tensor) -> Tensor:
    return x.rot90(1, (-2, -1)).flatten(1)


def _learn(net: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, seed: int) -> nn.Module:
    train(net, x, y, lr=lr, steps=steps, clip=torch.inf, generator=torch.Generator().manual_seed(seed))
    return net
