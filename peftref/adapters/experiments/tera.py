"""TeRA and its neighbours on turned digits, by number of trained parameters; and on a small vision transformer.

A multilayer perceptron, 64-128-128-10, has learned digits of 8 x 8 pixels upright and is given 400 turned by 90
degrees; its two hidden layers are adapted. The transformer learns clothes turned by 90 degrees. The ``gpu`` size has a
ViT-B/16 learn CIFAR-100.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from ...data import load
from ...fitting import accuracy, train
from ..baselines.lora import LoRA
from ..core.bank import Bank
from ..core.injection import adapters, inject
from ..core.layers import view
from ..tera import TeRA
from ._pieces import Claim, compare_pieces, cut_test, judged, protocol_of
from .at_scale import LARGE, record_large
from .transfer import LINEARS, probe, shifted

__all__ = ["METHODS", "MINUTES", "NEEDS", "PRESETS", "adapted", "run", "turned", "upright_net"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": [0, 1],
        "lrs": [1e-1],
        "steps": 2,
        "start_steps": 5,
        "train": 64,
        "test": 200,
        "vit_lrs": [1e-2],
        "vit_steps": 2,
    },
    "cpu": {
        "seeds": [0, 1, 2],
        "lrs": [3e-2, 1e-1, 2e-1],
        "steps": 250,
        "start_steps": 500,
        "train": 800,
        "test": 1000,
        "vit_lrs": [1e-2, 3e-2],
        "vit_steps": 50,
    },
    "gpu": {"large": LARGE},
}
MINUTES = {"smoke": 0.1, "cpu": 2, "gpu": 9}
NEEDS = {"gpu": ("cuda", "cifar100")}

ATTENTION = r"blocks\.\d+\.attn\.(qkv|proj)"
WHOLE = "TeRA, (o; i)"
SPLIT = "TeRA, (o; 2 modes)"
BOTH = "TeRA, both sides"
IDENTITY = "TeRA, identity"
VERA = "VeRA's form, full rank"


def _tera(**options: Any) -> Callable[[nn.Module, int], object]:
    return lambda net, seed: inject(net, TeRA, ["0", "2"], bank=Bank(seed), **options)


def _lora(r: int) -> Callable[[nn.Module, int], object]:
    return lambda net, seed: inject(net, LoRA, ["0", "2"], r=r, lora_alpha=r)


def _vera(net: nn.Module, seed: int) -> None:
    """The limit of TeRA that is VeRA at full rank: one mode on either side, and A^(1) = I."""
    inject(net, TeRA, ["0", "2"], bank=Bank(seed), in_modes=1)
    for adapter in adapters(net).values():
        network: Any = cast(TeRA, adapter).network
        network.left_0 = torch.eye(len(network.left_0))


METHODS: dict[str, Callable[[nn.Module, int], object]] = {
    "LoRA, r = 1": _lora(1),
    "LoRA, r = 2": _lora(2),
    VERA: _vera,
    WHOLE: _tera(in_modes=1),
    SPLIT: _tera(),
    BOTH: _tera(out_modes=2),
    IDENTITY: _tera(factors="identity"),
}
SPLITS = "Fig. 4: Llama-2-7B, read off"
FACTORS = "ablation of the factors"
# Table 2 compares TeRA with a LoRA of 64 times its parameters and with VeRA of low rank: rank 1 and full rank are ours.
CLAIMS = (
    Claim("digits: TeRA - LoRA, r = 1", SPLIT, "LoRA, r = 1"),
    Claim("digits: TeRA - VeRA's form at full rank", SPLIT, VERA),
    Claim("digits: TeRA, whole input - VeRA's form at full rank", WHOLE, VERA),
    Claim("digits: both sides - one side", BOTH, SPLIT, SPLITS, -13.3, "below"),
    Claim("digits: identity - random factors", IDENTITY, SPLIT, FACTORS, None, "below"),
    Claim("digits: TeRA - LoRA, r = 2", SPLIT, "LoRA, r = 2"),
    Claim("digits: split - whole input", SPLIT, WHOLE),
)
VIT_CLAIMS = (
    Claim("transformer: TeRA - LoRA, r = 1", "TeRA", "LoRA, r = 1"),
    Claim("transformer: TeRA - head only", "TeRA", "head only"),
)
SMALL: dict[str, Callable[[nn.Module], object]] = {
    "head only": probe,
    "LoRA, r = 1": lambda net: inject(net, LoRA, ATTENTION, r=1, lora_alpha=1),
    "TeRA": lambda net: inject(net, TeRA, ATTENTION, bank=Bank(0)),
}
BIG: dict[str, Callable[[nn.Module], object]] = {
    "LoRA, r = 1": lambda net: inject(net, LoRA, LINEARS, r=1, lora_alpha=1),
    "TeRA": lambda net: inject(net, TeRA, LINEARS, in_modes=3, bank=Bank(0)),
    "both sides": lambda net: inject(net, TeRA, LINEARS, out_modes=2, bank=Bank(0)),
    "identity": lambda net: inject(net, TeRA, LINEARS, in_modes=3, factors="identity", bank=Bank(0)),
}
BIG_CLAIMS = (
    Claim("ViT-B/16: TeRA - LoRA, r = 1", "TeRA", "LoRA, r = 1"),
    Claim("ViT-B/16: both sides - one side", "both sides", "TeRA", SPLITS, -13.3, "below"),
    Claim("ViT-B/16: identity - random factors", "identity", "TeRA", FACTORS, None, "below"),
)


def run(
    each: Callable[..., Any], *, data: Path | None = None, large: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Perceptron and transformer, or the large network.

    Args:
        each: of :func:`peftref.recording.record`.
        data: the reader's folder, for the large network.
        large: settings of the large network.
        settings: of the small ones.
    """
    if large:
        return record_large(each, BIG, BIG_CLAIMS, data, **large)
    rows = []
    for name in METHODS:
        rows += each(f"turned digits: {name}", _digit_runs, name, settings)
    digits = pd.DataFrame(rows)
    task = cut_test(shifted("rotated", settings["train"], settings["train"] // 4), settings["test"])
    options = {"seeds": settings["seeds"], "lrs": settings["vit_lrs"], "steps": settings["vit_steps"]}
    runs = compare_pieces(each, SMALL, task, **options)
    found = judged(digits, *CLAIMS) + judged(runs, *VIT_CLAIMS)
    spectra = {name: [row["spectrum"] for row in rows if row["method"] == name] for name in METHODS}
    arrays = {
        "digits": digits.drop(columns="spectrum").to_dict("list"),
        "transformer": runs.to_dict("list"),
        "spectra": {name: torch.tensor(values).mean(0) for name, values in spectra.items()},
    }
    protocol = protocol_of(load("fashion8k"), weights="pretrained_vit()", digits=load("digits").sha256)
    return {"rows": found, "arrays": arrays, "protocol": protocol}


def turned(x: Tensor) -> Tensor:
    """Images turned by 90 degrees, as rows.

    Args:
        x: ``(N, 1, 8, 8)``.
    """
    return x.rot90(1, (-2, -1)).flatten(1)


def upright_net(steps: int = 500) -> nn.Sequential:
    """The perceptron, trained on upright digits."""
    digits = load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    torch.manual_seed(0)
    train(net, digits.train.x.flatten(1), digits.train.y, lr=1e-2, steps=steps)
    return net


def adapted(base: nn.Module, name: str, lr: float, seed: int, steps: int = 250) -> nn.Module:
    """A copy of the perceptron, adapted to 400 turned digits by one of ``METHODS``.

    Args:
        base: of :func:`upright_net`.
        name: of the method.
        lr: peak of the schedule.
        seed: of the bank, the adapter and the batches.
        steps: updates.
    """
    digits = load("digits")
    net = copy.deepcopy(base)
    torch.manual_seed(seed)
    METHODS[name](net, seed)
    torch.manual_seed(seed)
    train(net, turned(digits.train.x)[:400], digits.train.y[:400], lr=lr, steps=steps)
    return net


def _digit_runs(name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    digits = load("digits")
    base = upright_net(settings["start_steps"])
    x = turned(digits.train.x)[400:600]
    y = digits.train.y[400:600]

    def score(lr: float) -> float:
        return accuracy(adapted(base, name, lr, 100, settings["steps"])(x), y)

    lr = max(settings["lrs"], key=score)
    rows = []
    for seed in settings["seeds"]:
        net = adapted(base, name, lr, seed, settings["steps"])
        values = torch.linalg.svdvals(adapters(net)["2"].delta(view(base[2]))[0].detach().double())
        rows.append(
            {
                "method": name,
                "seed": seed,
                "lr": lr,
                "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
                "rank": int((values > 1e-5 * values[0]).sum()),
                "accuracy": accuracy(net(turned(digits.test.x)), digits.test.y),
                "spectrum": torch.where(values > 1e-5 * values[0], values / values[0], 0.0).tolist(),
            }
        )
    return rows
