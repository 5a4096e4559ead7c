"""The adapters on a large vision transformer: what the guarded cells of their chapters run.

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
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Dataset, Split
from ...models.cnn import Normalised, from_timm
from .transfer import LRS, Task, compare, summary

__all__ = ["TAG", "Enlarged", "held_out", "run_at_scale"]

TAG = "vit_base_patch16_224.augreg2_in21k_ft_in1k"


class Enlarged(nn.Module):
    """A network of timm behind bicubic interpolation, for small images in [0, 1] of one or three channels.

    Args:
        net: with its normalisation inside.
        size: side in pixels that it is fed.
    """

    def __init__(self, net: Normalised, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size

    @property
    def head(self) -> nn.Module:
        classifier: nn.Module = self.net.model.get_classifier()
        return classifier

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.expand(-1, 3, -1, -1), (self.size, self.size), mode="bicubic").clamp(0, 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits: Tensor = self.net(x)
            return logits.float()


def held_out(data: Dataset, n_val: int = 5000, seed: int = 0) -> Task:
    """A data set as a task: ``n_val`` of its training images are kept for the choice of the learning rate."""
    if not 0 < n_val < len(data.train.y):
        raise ValueError(f"n_val: expected a number in [1, {len(data.train.y) - 1}], got {n_val}")
    order = torch.randperm(len(data.train.y), generator=torch.Generator().manual_seed(seed))
    val, train = order[:n_val], order[n_val:]
    x, y = data.train
    return Task(data.name, Split(x[train], y[train]), Split(x[val], y[val]), data.test)


def run_at_scale(
    methods: Mapping[str, Callable[[nn.Module], object]], task: Task, *, tag: str = TAG, pretrained: bool = True,
    size: int = 224, epochs: float = 5, steps: int | None = None, batch_size: int = 128,
    lrs: Sequence[float] = LRS, seeds: Sequence[int] = (0,), device: torch.device | str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy in % of several methods on one task, with what they train and cost.

    Args:
        methods: name -> function that changes the network in place, as for
            :func:`peftref.adapters.experiments.transfer.compare`.
        task: of :func:`held_out`, for example ``held_out(load("cifar100"))``.
        tag: of timm, architecture and weights.
        pretrained: let timm download the weights.
        size: side in pixels that images are enlarged to.
        epochs: of each training; or ``steps``, if given.
        device: default: a GPU if there is one.

    Returns:
        :func:`~peftref.adapters.experiments.transfer.summary` of the runs; ``attrs["protocol"]`` says what was run.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    steps = steps or max(1, math.ceil(epochs * len(task.train.y) / batch_size))
    image: dict[str, Any] = {} if pretrained else {"img_size": size}  # positions of shipped weights fit one size

    def start(num_classes: int) -> Enlarged:
        net = from_timm(tag, pretrained=pretrained, num_classes=num_classes, **image)
        return Enlarged(net.requires_grad_(False), size)

    runs = compare(methods, task, seeds=seeds, lrs=lrs, steps=steps, batch_size=batch_size, start=start, device=device)
    table = summary(runs)
    table.attrs["protocol"] = {
        "tag": tag, "pretrained": pretrained, "size": size, "data": task.name, "train": len(task.train.y),
        "val": len(task.val.y), "test": len(task.test.y), "steps": steps, "batch_size": batch_size,
        "lrs": list(lrs), "seeds": list(seeds), "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }  # fmt: skip
    return table
