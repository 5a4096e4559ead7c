r"""LAE on clothes that lie on their side: a frozen vision transformer, five tasks of two classes, three small modules.

*Sequential* tuning as it is usually meant, a softmax over all classes seen, differs from LAE in three ways at once: the
loss, the frozen epochs, the second copy. So each step between the two is an arm of its own: sequential tuning with the
loss of LAE, the online copy alone (which has the loss and the frozen epochs), and the vote. *Frozen* trains the head
alone, with the loss of LAE. Every arm chooses its rate on validation images, in another order of the classes.

The sizes ``t4`` and ``gpu`` are the paper's experiment with part of the images: a ViT-B/16, CIFAR-100 in ten tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ...data import load
from ...results import finding
from ._lae_claims import LOCAL, PLAIN, Arm, difference, numbers, rows
from .lae_at_scale import run_at_scale
from .turned_clothes import learned

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

COPIES = ("online", "offline", "ensemble", "mean vote")
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": [1, 2],
        "pets": ["Adapter"],
        "rates": [3e-3],
        "per_class": 12,
        "every": 50,
        "frozen": 1,
        "epochs": 1,
        "kept": [0.9, 0.0],
    },
    "cpu": {
        "seeds": [1, 2, 3, 4, 5],
        "pets": ["Adapter", "LoRA", "Prefix"],
        "rates": [3e-3, 1e-2],
        "per_class": 60,
        "every": 4,
        "frozen": 10,
        "epochs": 3,
        "kept": [1.0, 0.97, 0.9, 0.7, 0.4, 0.0],
    },
    "t4": {"seeds": [0, 1], "large": True, "limit": 50, "test_limit": 20, "epochs": 20, "frozen_epochs": 15},
    "gpu": {"seeds": [0, 1, 2], "large": True, "limit": 100, "test_limit": 50, "epochs": 10, "frozen_epochs": 7},
}
MINUTES = {"smoke": 0.1, "cpu": 10, "t4": 15, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": (),
    "t4": ("cuda", "vision", "cifar100"),
    "gpu": ("cuda", "vision", "cifar100"),
}


def run(each: Callable[..., Any], *, data: Path | None = None, large: bool = False, **settings: Any) -> dict[str, Any]:
    """All networks, one after the other; see :mod:`peftref.results`."""
    return _large(each, data, **settings) if large else _small(each, **settings)


def arms(pets: Sequence[str], frozen: int, epochs: int) -> dict[Arm, dict[str, Any]]:
    """What :func:`learned` is told beside the module, the rate and the seed, by arm and module."""
    both: dict[str, dict[str, Any]] = {
        "LAE": {},
        "sequential": {"frozen": 0, "local": False},
        LOCAL: {"frozen": 0},
    }
    found = {(name, pet): options for name, options in both.items() for pet in pets}
    if "Prefix" in pets:
        found["LAE", PLAIN] = {}
    found["frozen", "Adapter"] = {"train": False}
    found["none frozen", "Adapter"] = {"frozen": 0, "epochs": frozen + epochs}
    found["global loss", "Adapter"] = {"local": False}
    found["LAE, digits", "Adapter"] = {"digits": True}
    found["frozen, digits", "Adapter"] = {"digits": True, "train": False}
    return found


SAME_RATE = {  # arms that take the rate another one chose
    ("none frozen", "Adapter"): ("LAE", "Adapter"),
    ("global loss", "Adapter"): ("LAE", "Adapter"),
    ("LAE, digits", "Adapter"): ("LAE", "Adapter"),
    ("frozen, digits", "Adapter"): ("frozen", "Adapter"),
}


def _small(
    each: Callable[..., Any],
    *,
    seeds: Sequence[int],
    pets: Sequence[str],
    rates: Sequence[float],
    frozen: int,
    epochs: int,
    kept: Sequence[float],
    **size: Any,
) -> dict[str, Any]:
    wanted = arms(pets, frozen, epochs)
    plan = size | {"frozen": frozen, "epochs": epochs, "steps": (frozen + epochs) * max(2 * size["per_class"] // 24, 1)}
    rate: dict[Arm, float] = {}
    for (name, pet), options in wanted.items():
        if (name, pet) in SAME_RATE:
            rate[name, pet] = rate[SAME_RATE[name, pet]]
            continue
        told = plan | options | {"part": "val", "tasks": 3}
        tried = {lr: each(f"tune {name}, {pet}, {lr}", learned, pet, 0, lr, **told) for lr in rates}
        rate[name, pet] = max(tried, key=lambda lr: tried[lr][_shown(name)]["all"][2])
    found = {}
    for (name, pet), options in wanted.items():
        follow = kept if (name, pet) == ("LAE", "Adapter") else ()
        found[name, pet] = [
            each(f"{name}, {pet}, {s}", learned, pet, s, rate[name, pet], kept=follow, **{**plan, **options})
            for s in seeds
        ]
    played = {
        (pet, still): each(
            f"play {pet}, {still}", learned, pet, seeds[0], rate["LAE", pet], kept=kept, **{**plan, "frozen": still}
        )
        for pet, still in product(pets, (0, frozen))
    }
    ends = {arm: {c: numbers(runs, c) for c in COPIES} for arm, runs in found.items()}
    return {
        "rows": rows(ends, pets),
        "arrays": {
            "arms": [[list(table.values()) for table in of_copy.values()] for of_copy in ends.values()],
            "stream": [[one[_shown(name)]["all"] for one in runs] for (name, _), runs in found.items()],
            "kept": [one["kept"] for one in found["LAE", "Adapter"]],
            "played": [one["kept"] for one in played.values()],
        },
        "protocol": {
            "data": "fashion8k, turned by 90 degrees; mnist5k",
            "sha256": [load("fashion8k").sha256, load("mnist5k").sha256],
            "weights": "pretrained_vit()",
            "arms": [list(arm) for arm in found],
            "copies": list(COPIES),
            "measures": ["old", "new", "last"],
            "chosen": {" / ".join(arm): lr for arm, lr in rate.items()},
            "kept_by_learner": 0.9,
            "played": [list(point) for point in played],
        },
    }


def _shown(name: str) -> str:
    """The copy by which an arm is judged."""
    return "ensemble" if name.startswith(("LAE", "none", "global")) else "online"


def _large(each: Callable[..., Any], data: Path | None, *, seeds: Sequence[int], **options: Any) -> dict[str, Any]:
    """The paper's backbone and data, one small module; images in [0, 1], as the published code feeds them."""
    from ...models.cnn import from_timm

    def one(seed: int) -> list[list[float]]:
        torch.manual_seed(seed)
        vit: Any = from_timm("vit_base_patch16_224.augreg_in21k", pretrained=True).model  # without normalisation
        table = run_at_scale(vit, load("cifar100", data), "Adapter", seed=seed, augmented=False, **options)
        found: list[list[float]] = table.to_numpy().tolist()
        return found

    tables = torch.tensor([each(f"Adapter, {seed}", one, seed) for seed in seeds])  # (seeds, tasks, copies)
    online, offline, ensemble = tables[:, -1].T.tolist()
    vs = {"vote": ensemble, "online": online}
    told = "as VPT-NSP2, NeurIPS 2024, quotes it (CIFAR-100, ten tasks, all images)"
    level = finding("last accuracy of LAE, Adapter", ensemble, where=told, unit="%", claim="paper", paper=85.59)
    slow = {"offline": offline, "online": online}
    gain = difference("the vote over the online copy, Adapter", "ours", vs)
    other = difference("the offline copy over the online one, all classes", "ours", slow)
    protocol = {"data": "cifar100", "weights": "vit_base_patch16_224.augreg_in21k", "module": "Adapter"}
    return {"rows": [level, gain, other], "arrays": {"stream": tables}, "protocol": protocol}
