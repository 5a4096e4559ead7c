"""The adapters on a large vision transformer: the ``gpu`` size of the recorded runs of this part.

A ViT-B/16 of timm, pre-trained on ImageNet-21k, learns CIFAR-100 with images enlarged to 224 pixels; protocol and
learning rates as in :mod:`peftref.adapters.experiments.transfer`, in bfloat16 where a GPU does the work.

>>> from peftref.adapters.core.injection import inject
>>> from peftref.adapters.baselines.lora import LoRA
>>> from peftref.adapters.experiments.transfer import LINEARS, probe, shifted
>>> tiny = {"tag": "vit_tiny_patch16_224", "pretrained": False, "size": 32, "device": "cpu"}
>>> methods = {"probe": probe, "LoRA": lambda net: inject(net, LoRA, LINEARS, r=2)}
>>> small = shifted("digits", n_train=16, n_val=8)
>>> small = small._replace(test=small.val)
>>> table = run_at_scale(methods, small, lrs=(1e-3,), steps=1, batch_size=4, **tiny)
>>> table["trainable"].to_dict(), table.attrs["protocol"]["train"]
({'probe': 0, 'LoRA': 73728}, 16)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ...at_scale import Resized, pick_device, protocol
from ...data import Dataset, Split, load
from ...models.cnn import from_timm
from ._pieces import Claim, compare_pieces, judged
from .transfer import LRS, Task, compare, summary

__all__ = ["LARGE", "TAG", "held_out", "record_large", "run_at_scale", "start_large"]

TAG = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
# Settings of the ``gpu`` sizes: some seven minutes for four methods on a data-centre GPU.
LARGE: dict[str, Any] = {"seeds": [0, 1, 2], "steps": 150, "lrs": [3e-3, 1e-2], "batch_size": 128}


def held_out(data: Dataset, n_val: int = 5000, seed: int = 0) -> Task:
    """A data set as a task: ``n_val`` of its training images are kept for the choice of the learning rate.

    Args:
        data: for example ``load("cifar100", root)``.
        n_val: images kept.
        seed: of the draw.
    """
    if not 0 < n_val < len(data.train.y):
        raise ValueError(f"n_val: expected a number in [1, {len(data.train.y) - 1}], got {n_val}")
    order = torch.randperm(len(data.train.y), generator=torch.Generator().manual_seed(seed))
    val = order[:n_val]
    train = order[n_val:]
    x, y = data.train
    return Task(data.name, Split(x[train], y[train]), Split(x[val], y[val]), data.test)


def start_large(num_classes: int, *, tag: str = TAG, pretrained: bool = True, size: int = 224) -> nn.Module:
    """A frozen network of timm with a new head, behind an enlargement of its images.

    Args:
        num_classes: of the new head.
        tag: of timm, architecture and weights.
        pretrained: let timm download the weights.
        size: side in pixels that images are enlarged to.
    """
    image: dict[str, Any] = {} if pretrained else {"img_size": size}  # positions of shipped weights fit one size
    net = from_timm(tag, pretrained=pretrained, num_classes=num_classes, **image)
    return Resized(net.requires_grad_(False), size)


def run_at_scale(
    methods: Mapping[str, Callable[[nn.Module], object]],
    task: Task,
    *,
    tag: str = TAG,
    pretrained: bool = True,
    size: int = 224,
    epochs: float = 5,
    steps: int | None = None,
    batch_size: int = 128,
    lrs: Sequence[float] = LRS,
    seeds: Sequence[int] = (0,),
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Accuracy in % of several methods on one task, with what they train and cost.

    Args:
        methods: name -> function that changes the network in place, as for
            :func:`peftref.adapters.experiments.transfer.compare`.
        task: of :func:`held_out`, for example ``held_out(load("cifar100"))``.
        tag: of timm, architecture and weights.
        pretrained: let timm download the weights.
        size: side in pixels that images are enlarged to.
        epochs: of each training; or ``steps``, if given.
        steps: updates of each training.
        batch_size: images of an update.
        lrs: learning rates to choose from.
        seeds: of the runs that count.
        device: default: a GPU if there is one.

    Returns:
        :func:`~peftref.adapters.experiments.transfer.summary` of the runs; ``attrs["protocol"]`` says what was run.
    """
    device = pick_device(device)
    steps = steps or max(1, math.ceil(epochs * len(task.train.y) / batch_size))
    start = partial(start_large, tag=tag, pretrained=pretrained, size=size)
    runs = compare(methods, task, seeds=seeds, lrs=lrs, steps=steps, batch_size=batch_size, start=start, device=device)
    table = summary(runs)
    settings = {"tag": tag, "pretrained": pretrained, "size": size, "steps": steps, "batch_size": batch_size}
    counts = {"data": task.name, "train": len(task.train.y), "val": len(task.val.y), "test": len(task.test.y)}
    table.attrs["protocol"] = protocol(device, **settings, **counts, lrs=list(lrs), seeds=list(seeds))
    return table


def record_large(
    each: Callable[..., Any],
    methods: Mapping[str, Callable[[nn.Module], object]],
    claims: Sequence[Claim],
    data: Path | None,
    *,
    seeds: Sequence[int],
    steps: int,
    lrs: Sequence[float],
    batch_size: int,
) -> dict[str, Any]:
    """What the ``gpu`` size of an experiment returns.

    Args:
        each: of :func:`peftref.recording.record`.
        methods: as for :func:`run_at_scale`.
        claims: about these methods.
        data: the reader's folder, with CIFAR-100 in it.
        seeds: of the runs that count.
        steps: updates of each training.
        lrs: learning rates to choose from.
        batch_size: images of an update.
    """
    task = held_out(load("cifar100", data))
    device = pick_device()
    options = {"seeds": seeds, "lrs": lrs, "steps": steps, "batch_size": batch_size}
    runs = compare_pieces(each, methods, task, start=start_large, device=device, **options)
    counts = {"data": task.name, "train": len(task.train.y), "val": len(task.val.y), "test": len(task.test.y)}
    return {
        "rows": judged(runs, *claims),
        "arrays": {"runs": runs.to_dict("list")},
        "protocol": protocol(device, weights=TAG, **counts),
    }
