"""First session adaptation of a large backbone: what the sizes ``t4`` and ``gpu`` of the recorded run do.

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
from torch import Tensor, nn

from ...at_scale import Resized, pick_device, protocol
from ...data import Dataset
from ..core.film import EFFICIENTNET, film_parameters, inject_film
from ..core.metrics import average_accuracy, evaluate
from ..core.streams import class_incremental
from ..fsa import FSA

__all__ = ["TAG", "Enlarged", "run_at_scale"]

TAG = "efficientnet_b0.ra_in1k"


class Enlarged(Resized):
    """A body with timm's protocol that enlarges small images inside; in bfloat16 where a GPU does the work."""

    def forward_features(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return super().forward_features(x)

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(h.float(), pre_logits=pre_logits)


def run_at_scale(
    model: nn.Module,
    data: Dataset,
    sessions: Sequence[int],
    bodies: Mapping[str, Mapping[str, Any]],
    *,
    size: int | None = None,
    per_class: int | None = None,
    ridge: float = 1.0,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
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
        One row per body: trained parameters of the body, accuracy in % over all test images after the last session and
        as the mean over sessions, seconds; ``attrs["protocol"]`` says what was run.
    """
    device = pick_device(device)
    tasks = [task.to(device) for task in class_incremental(data, sessions, seed=seed, per_class=per_class)]
    model = (Enlarged(model, size) if size else copy.deepcopy(model)).to(device)
    counts = torch.tensor([len(task.test.y) for task in tasks])
    rows = {}
    for body, given in bodies.items():
        training = {"seed": seed, **given}
        if body == "film":
            training = {"layers": EFFICIENTNET, **training}
        start = time.perf_counter()
        fsa = FSA(model, body, ridge=ridge, num_classes=len(data.classes), **training).adapt(*tasks[0].train)
        accuracy = torch.stack([evaluate(fsa.observe(*task.train), tasks) for task in tasks])
        after = average_accuracy(accuracy, counts)  # over images: sessions differ in size
        seconds = time.perf_counter() - start
        rows[body] = [_trained(model, body, training), after[-1].item(), after.mean().item(), seconds]
    columns = ["trained", "last (%)", "mean over sessions (%)", "seconds"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("body")
    table.attrs["protocol"] = protocol(
        device,
        data=data.name,
        sha256=data.sha256,
        sessions=list(sessions),
        per_class=per_class,
        size=size,
        ridge=ridge,
        bodies={kind: dict(training) for kind, training in bodies.items()},
        seed=seed,
    )
    return table


def _trained(model: nn.Module, body: str, training: Mapping[str, Any]) -> int:
    """Number of the body's parameters that the first session moves."""
    if body == "film":
        model = copy.deepcopy(model)
        inject_film(model, training["layers"])
    parameters = {"none": [], "film": film_parameters(model), "full": list(model.parameters())}[body]
    return sum(p.numel() for p in parameters)
