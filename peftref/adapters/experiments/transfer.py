"""One experiment for every adapter: the small vision transformer of :mod:`peftref.models.vit`, taught a shifted task.

The protocol is that of VTAB-1k (Zhai et al., 2019, arXiv 1910.04867) in miniature: 800 images to learn from, 200 to
choose the learning rate by, and test images, which :func:`compare` chooses nothing by. All methods of one call get a
fresh copy of the same pre-trained network with a new head, the same steps, and the same learning rates to choose from.

>>> task = shifted("inverted", n_train=64, n_val=32)
>>> task.train.x.shape, task.test.y.shape
(torch.Size([64, 1, 28, 28]), torch.Size([2000]))
>>> from peftref.adapters.core.injection import inject
>>> from peftref.adapters.baselines.lora import LoRA
>>> methods = {"probe": probe, "LoRA": lambda net: inject(net, LoRA, LINEARS, r=2)}
>>> runs = compare(methods, task, seeds=(0,), lrs=(3e-3,), steps=3)
>>> summary(runs)[["trainable", "rank"]].T.to_dict()
{'probe': {'trainable': 0.0, 'rank': 0.0}, 'LoRA': {'trainable': 8192.0, 'rank': 2.0}}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Split, load
from ...fitting import accuracy, best_rate, train
from ...models.vit import ViT, pretrained_vit
from ..core.adapter import Adapter
from ..core.host import Host
from ..core.layers import view

__all__ = [
    "LINEARS",
    "LRS",
    "SHIFTS",
    "Run",
    "Task",
    "adapt",
    "compare",
    "fresh",
    "full",
    "probe",
    "shifted",
    "summary",
    "trainable",
    "update_rank",
]

LINEARS = r"(.*\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"  # every matrix inside the blocks, timm's too
LRS = (1e-3, 3e-3, 1e-2, 3e-2)
SHIFTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {  # data set, and what is done to its images
    "digits": ("mnist5k", lambda x: x),
    "rotated": ("fashion8k", lambda x: x.rot90(1, (-2, -1))),
    "inverted": ("fashion8k", lambda x: 1 - x),
}
TUNING_SEED = 1000  # of the runs that choose the learning rate; none of the runs that count


class Task(NamedTuple):
    """Images in [0, 1] and ten classes: to train on, to choose by, to report on."""

    name: str
    train: Split
    val: Split
    test: Split


def shifted(name: str, n_train: int = 800, n_val: int = 200, seed: int = 0) -> Task:
    """A task unlike the one the network knows.

    Args:
        name: ``"digits"`` (handwritten digits), ``"rotated"`` or ``"inverted"`` (clothes turned by 90 degrees, or
            black on white). The network has seen the training images of the last two as they were, never the test
            images.
        n_train: images to learn from, drawn without replacement from the training images.
        n_val: images to choose by, drawn likewise.
        seed: of that draw.

    Raises:
        ValueError: no such task, or more images than there are.
    """
    if name not in SHIFTS:
        raise ValueError(f"name: expected one of {list(SHIFTS)}, got {name!r}")
    dataset, change = SHIFTS[name]
    data = load(dataset)
    if min(n_train, n_val) < 1 or n_train + n_val > len(data.train.y):
        have = len(data.train.y)
        raise ValueError(f"n_train, n_val: expected positive numbers, {have} at most in all, got {n_train} and {n_val}")
    order = torch.randperm(len(data.train.y), generator=torch.Generator().manual_seed(seed))
    train = order[:n_train]
    val = order[n_train : n_train + n_val]
    return Task(
        name,
        Split(change(data.train.x[train]), data.train.y[train]),
        Split(change(data.train.x[val]), data.train.y[val]),
        Split(change(data.test.x), data.test.y),
    )


def fresh(num_classes: int = 10) -> ViT:
    """The pre-trained network, frozen, with a new head that is trained."""
    model = pretrained_vit().requires_grad_(False)
    model.head = nn.Linear(model.num_features, num_classes)
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)
    return model


def probe(net: nn.Module) -> None:
    """The least: only the new head is trained."""


def full(net: nn.Module) -> None:
    """The most: every weight is trained."""
    net.requires_grad_(True)


@dataclass
class Run:
    """One adaptation.

    Attributes:
        model: in eval mode.
        losses: training loss of each step, ``(steps,)``.
        val: accuracy on the validation images in %.
        test: accuracy on the test images in %.
        val_loss: mean cross-entropy on the validation images.
        seconds: per step.
    """

    model: nn.Module
    losses: Tensor
    val: float
    test: float
    val_loss: float
    seconds: float


def adapt(
    build: Callable[[nn.Module], object],
    task: Task,
    *,
    lr: float,
    seed: int = 0,
    steps: int = 100,
    batch_size: int = 32,
    start: Callable[[int], nn.Module] = fresh,
    device: torch.device | str = "cpu",
) -> Run:
    """Train what ``build`` leaves trainable, and the head, by :func:`peftref.fitting.train`.

    Args:
        build: gets the network to start from and changes it in place, as
            ``lambda net: inject(net, LoRA, LINEARS, r=4)`` does; its head is trained in any case.
        task: of :func:`shifted`, for example.
        lr: peak of the schedule.
        seed: of the head, of what ``build`` draws, and of the batches; the global generator stays as it was.
        start: number of classes -> network with a new ``head``.
        device: where the network is trained; batches are moved there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = start(int(task.train.y.max()) + 1)
        build(model)
        model.head.requires_grad_(True)  # an adapter has frozen all that there was
        model.to(device)
        begin = time.perf_counter()
        losses = train(model, task.train.x, task.train.y, lr=lr, steps=steps, batch_size=batch_size)
        seconds = (time.perf_counter() - begin) / steps
    val, test = (_logits(model, split.x, device) for split in (task.val, task.test))
    val_loss = F.cross_entropy(val, task.val.y).item()
    return Run(model, losses, accuracy(val, task.val.y), accuracy(test, task.test.y), val_loss, seconds)


def compare(
    methods: Mapping[str, Callable[[nn.Module], object]],
    task: Task,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    lrs: Sequence[float] = LRS,
    **options: Any,
) -> pd.DataFrame:
    """Each method at the learning rate that was best for it on the validation images, once for every seed.

    The rate is chosen in runs of their own, by accuracy and, between equals, by loss; ``options`` go to :func:`adapt`.

    Returns:
        One row per method and seed: the rate, accuracy on the test images in %, last loss, trainable parameters outside
        of the head, rank of the update, milliseconds per step.
    """
    rows = []
    for name, build in methods.items():

        def score(rate: float, build: Callable[[nn.Module], object] = build) -> tuple[float, float]:
            run = adapt(build, task, lr=rate, seed=TUNING_SEED, **options)
            return run.val, -run.val_loss

        lr = best_rate(lrs, score)
        for seed in seeds:
            run = adapt(build, task, lr=lr, seed=seed, **options)
            rows.append(
                {
                    "method": name,
                    "seed": seed,
                    "lr": lr,
                    "accuracy": run.test,
                    "loss": run.losses[-10:].mean().item(),
                    "trainable": trainable(run.model),
                    "rank": update_rank(run.model),
                    "ms": 1e3 * run.seconds,
                }
            )
    return pd.DataFrame(rows)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds of what :func:`compare` measured, one row per method."""
    by = runs.groupby("method", sort=False)
    table = by[["trainable", "rank", "lr", "accuracy"]].mean().astype({"trainable": int})
    return table.assign(sd=by["accuracy"].std(), loss=by["loss"].mean(), ms=by["ms"].median())


def trainable(model: nn.Module) -> int:
    """Numbers that are trained, the head apart."""
    head = {id(p) for p in model.get_submodule("head").parameters()}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in head)


@torch.inference_mode()
def update_rank(model: nn.Module, rtol: float = 1e-5) -> float:
    """Mean rank of the updates of all adapted layers; 0 without any, NaN where weights are trained without an adapter
    or an adapter is not linear.

    Args:
        rtol: singular values below this share of the largest count as zero (1e-5: float32's rounding is smaller).
    """
    hosts = [m for m in model.modules() if isinstance(m, Host)]
    ranks = []
    linear = all(host.adapters[name].mergeable for host in hosts for name in host.active)
    if not linear or (trainable(model) and not hosts):
        return float("nan")
    for host in hosts:
        base = view(host.base_layer)
        dW = sum(cast(Adapter, host.adapters[name]).delta(base)[0].double() for name in host.active)
        ranks.append(torch.linalg.matrix_rank(dW, rtol=rtol).double().item())
    return sum(ranks) / len(ranks) if ranks else 0.0


@torch.inference_mode()
def _logits(model: nn.Module, x: Tensor, device: torch.device | str) -> Tensor:
    return torch.cat([model(batch.to(device)).float().cpu() for batch in x.split(500)])
