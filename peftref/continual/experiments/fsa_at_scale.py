"""First session adaptation of a large backbone: what the guarded cell of the chapter runs.

An EfficientNet-B0 of timm, pre-trained on ImageNet, meets CIFAR-100 in sessions of ten classes, its images enlarged
to 224 pixels; the body is adapted on the first ten classes, in full or by FiLM, or not at all.

>>> from peftref.data import load
>>> from peftref.models import SmallCNN
>>> with torch.random.fork_rng():
...     body = SmallCNN()
>>> sessions = {"none": {}, "film": {"epochs": 1, "layers": None}}
>>> table = run_at_scale(body, load("digits"), [4, 6], sessions, per_class=20, device="cpu")
>>> table.index.tolist(), table["trained"].tolist()
(['none', 'film'], [0, 320])
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Dataset
from ..core.film import EFFICIENTNET, film_parameters, inject_film
from ..core.metrics import average_accuracy, evaluate
from ..core.streams import class_incremental
from ..fsa import FSA

__all__ = ["TAG", "Enlarged", "run_at_scale"]

TAG = "efficientnet_b0.ra_in1k"


class Enlarged(nn.Module):
    """A body with timm's protocol that takes small images: they are enlarged inside, so sets stay small in memory.

    Args:
        model: with its normalisation inside (:func:`peftref.models.from_timm`); in bfloat16 where a GPU does the work.
        size: side in pixels.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model: Any = model  # speaks timm's protocol, of which nn.Module says nothing
        self.size = size

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            h: Tensor = self.model.forward_features(x)
        return h

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        h = self.model.forward_head(h.float(), pre_logits=pre_logits)
        return h


def run_at_scale(
    model: nn.Module, data: Dataset, sessions: Sequence[int], bodies: Mapping[str, Mapping[str, Any]], *,
    size: int | None = None, per_class: int | None = None, ridge: float = 1.0, seed: int = 0,
    device: torch.device | str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy of each kind of body over a stream of sessions.

    Args:
        model: pre-trained body without classifier, for example ``from_timm(TAG, pretrained=True, num_classes=0)``.
        data: for example ``load("cifar100", root)``.
        sessions: number of classes of each, which together are all of them.
        bodies: ``"none"``, ``"film"`` or ``"full"`` -> settings of :func:`peftref.continual.fsa.first_session`. FiLM is
            placed as for EfficientNets unless ``layers`` says otherwise.
        size: side in pixels to which images are enlarged inside the model; default: as they are.
        per_class: training images of each class (few shots); default: all.
        ridge: of the head (1: official code).
        seed: of the order of the classes, of the choice of images and of training.
        device: default: a GPU if there is one.

    Returns:
        One row per body: trained numbers of the body, accuracy in % over all test images after the last session and in
        the mean over sessions, seconds; ``attrs["protocol"]`` says what was run.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tasks = [task.to(device) for task in class_incremental(data, sessions, seed=seed, per_class=per_class)]
    model = (Enlarged(model, size) if size else copy.deepcopy(model)).to(device)
    counts, rows = torch.tensor([len(task.test.y) for task in tasks]), {}
    for body, training in bodies.items():
        training = {"seed": seed, **({"layers": EFFICIENTNET} if body == "film" else {}), **training}
        start = time.perf_counter()
        fsa = FSA(model, body, ridge=ridge, num_classes=len(data.classes), **training).adapt(*tasks[0].train)
        accuracy = torch.stack([evaluate(fsa.observe(*task.train), tasks) for task in tasks])
        after = average_accuracy(accuracy, counts)  # over images: sessions differ in size
        seconds = time.perf_counter() - start
        rows[body] = [_trained(model, body, training), after[-1].item(), after.mean().item(), seconds]
    columns = ["trained", "last (%)", "mean over sessions (%)", "seconds"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("body")
    table.attrs["protocol"] = {
        "data": data.name, "sha256": data.sha256, "sessions": list(sessions), "per_class": per_class, "size": size,
        "ridge": ridge, "bodies": {k: dict(v) for k, v in bodies.items()}, "seed": seed, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }  # fmt: skip
    return table


def _trained(model: nn.Module, body: str, training: Mapping[str, Any]) -> int:
    """Numbers of the body that the first session moves."""
    if body == "film":
        model = copy.deepcopy(model)
        inject_film(model, training["layers"])
    parameters = {"none": [], "film": film_parameters(model), "full": list(model.parameters())}[body]
    return sum(p.numel() for p in parameters)
