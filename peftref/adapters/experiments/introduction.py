"""All methods of this part on one task: how much each trains, and what accuracy it reaches.

The small vision transformer that knows clothes learns handwritten digits from 800 images. Every method trains a similar
number of parameters where it leaves a choice, with the learning rate that is best for it on 200 other images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..adaptformer import AdaptFormer
from ..baselines.lora import LoRA
from ..bone import Bone
from ..core.bank import Bank
from ..core.injection import inject
from ..eva import collect, inject_eva
from ..hydra import Hydra
from ..tera import TeRA
from ..tlora import TLoRA
from ..vl_adapter import VLAdapter
from ._pieces import Claim, compare_pieces, cut_test, judged
from .transfer import LINEARS, Task, full, probe, shifted

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "names": ["head only", "all weights", "LoRA", "Bone", "EVA"],
        "task": "inverted",  # its data are read faster
        "seeds": [0, 1],
        "train": 32,
        "test": 100,
        "lrs": [1e-2],
        "steps": 1,
    },
    "cpu": {"seeds": [0, 1, 2, 3, 4], "train": 800, "test": None, "lrs": [3e-3, 1e-2, 3e-2], "steps": 100},
}
MINUTES = {"smoke": 0.1, "cpu": 8}
NEEDS: dict[str, tuple[str, ...]] = {}

HEAD = "head only"
ALL = "all weights"


def methods(task: Task) -> dict[str, Callable[[nn.Module], object]]:
    """Name -> what is done to the network.

    Args:
        task: whose training images EVA looks at.
    """

    def eva(net: nn.Module) -> None:
        inject_eva(net, collect(net, LINEARS, task.train.x.split(100), r=4), lora_alpha=4)

    return {
        HEAD: probe,
        ALL: full,
        "LoRA": lambda net: inject(net, LoRA, LINEARS, r=4, lora_alpha=4),
        "Bone": lambda net: inject(net, Bone, LINEARS, r=8),
        "Hydra": lambda net: inject(net, Hydra, LINEARS, r_par=2, r_seq=2),
        "TLoRA": lambda net: inject(net, TLoRA, LINEARS, transform_rank=1, residual_rank=4),
        "TeRA": lambda net: inject(net, TeRA, LINEARS, bank=Bank()),
        "EVA": eva,
        "AdaptFormer": lambda net: inject(net, AdaptFormer, r"blocks\.\d+", bottleneck=32),
        "VL-Adapter": lambda net: inject(net, VLAdapter, r"blocks\.\d+\.(attn\.proj|mlp\.fc2)", reduction=4),
    }


def run(
    each: Callable[..., Any],
    *,
    data: Path | None = None,
    names: list[str] | None = None,
    task: str = "digits",
    seeds: list[int],
    train: int,
    test: int | None,
    lrs: list[float],
    steps: int,
) -> dict[str, Any]:
    """The comparison.

    Args:
        each: of :func:`peftref.recording.record`.
        data: not needed.
        names: of methods, :data:`HEAD` and LoRA among them; None for all.
        task: of :func:`~peftref.adapters.experiments.transfer.shifted`.
        seeds: of the head, of the adapter, and of the batches.
        train: images to learn from; a quarter as many choose the learning rate.
        test: images to report on; None for all.
        lrs: learning rates to choose from.
        steps: of each training.
    """
    images = cut_test(shifted(task, train, train // 4), test)
    every = {name: build for name, build in methods(images).items() if names is None or name in names}
    runs = compare_pieces(each, every, images, seeds=seeds, lrs=lrs, steps=steps)
    claims = [Claim(f"{name} - {HEAD}", name, HEAD) for name in every if name != HEAD]
    claims += [Claim(f"{name} - LoRA", name, "LoRA") for name in every if name not in (HEAD, ALL, "LoRA")]
    by = runs.groupby("method", sort=False)
    arrays = {
        "accuracy": {name: group["accuracy"].tolist() for name, group in by},
        "trained": by["trainable"].first().astype(int).to_dict(),
        "rank": by["rank"].mean().to_dict(),
        "loss": by["loss"].mean().to_dict(),
    }
    return {"rows": judged(runs, *claims), "arrays": arrays, "protocol": {"rates": by["lr"].first().to_dict()}}
