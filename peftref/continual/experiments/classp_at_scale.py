r"""CLASSP's published experiment: one network learns MNIST, then Fashion-MNIST, with the same ten outputs for both.

The published protocol: 4 epochs of one and 1 of the other, batches of 32, a network of two convolutions. While the
first task is learned the optimiser takes plain steps and only accumulates; from the second on the decay is switched on
(:func:`published_switch`). Its accuracies are measured on the *training* images, with dropout still on; both those and
the usual ones, on test images in eval mode, are reported here.

>>> from peftref.continual.core.streams import domain_incremental
>>> from peftref.data import load
>>> tasks = domain_incremental(load("mnist5k"), load("fashion8k"))
>>> tasks = [t._replace(train=Split(*(v[:64] for v in t.train)), test=Split(*(v[:50] for v in t.test))) for t in tasks]
>>> methods = {"SGD": Method(lambda p: torch.optim.SGD(p, lr=0.1))}
>>> run_at_scale(tasks, methods, epochs=(1, 1), device="cpu").columns.tolist()[:3]
['first, before (%)', 'first, after (%)', 'second, after (%)']
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from ...at_scale import pick_device, protocol
from ...data import Dataset, Split
from ...data.read import read_idx
from ...fitting import batches
from ..core.metrics import evaluate
from ..core.rule import FineTune
from ..core.streams import Task

__all__ = ["Method", "PaperCNN", "as_published", "full_mnist", "published_switch", "run_at_scale"]

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
COLUMNS = [
    "first, before (%)",
    "first, after (%)",
    "second, after (%)",
    "first, after, as published (%)",
    "second, after, as published (%)",
]


class Method(NamedTuple):
    """How to learn: an optimiser for the whole stream, what happens to it before a later task, and the loss.

    Attributes:
        optimizer: parameters -> optimiser.
        switch: called with the optimiser before the second and every later task.
        rule: makes the rule of one stream, for example ``lambda: EWC(100.0)``.
    """

    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    switch: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None
    rule: Callable[[], FineTune] = FineTune


def published_switch(optimizer: torch.optim.Optimizer) -> None:
    """From here on steps decay, and without a threshold."""
    for group in optimizer.param_groups:
        group.update(apply_decay=True, threshold=0.0)


class PaperCNN(nn.Sequential):
    """Two 3 x 3 convolutions, max pooling, dropout of channels, a hidden layer, dropout, ten outputs.

    Args:
        width: channels of the first convolution (32: published); the second has twice, the hidden layer four times
            as many.
        side: of the square images, in pixels.
        mean: subtracted from the inputs (MNIST's, as published, for both sets).
        std: by which they are divided then (MNIST's).

    Shape:
        ``(N, 1, side, side) -> (N, 10)``.
    """

    def __init__(self, width: int = 32, side: int = 28, mean: float = 0.1307, std: float = 0.3081) -> None:
        self_side = (side - 4) // 2
        super().__init__(
            nn.Conv2d(1, width, 3),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.25),
            nn.Flatten(),
            nn.Linear(2 * width * self_side**2, 4 * width),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(4 * width, 10),
        )
        self.mean = mean
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward((x - self.mean) / self.std)  # type: ignore[no-untyped-call]  # nn.Sequential
        return logits


def full_mnist(root: str | Path) -> Dataset:
    """All 60,000 + 10,000 images of MNIST, from its four IDX files.

    Args:
        root: the files' own folder, or the ``root`` that torchvision's ``MNIST`` takes; plain or ``.gz``.

    Raises:
        FileNotFoundError: they are in neither.
        ValueError: a file is damaged, or there are other labels than images.
    """
    folders = [Path(root) / "MNIST" / "raw", Path(root)]
    digest = hashlib.sha256()
    for folder in folders:
        found = [next((p for p in (folder / f, folder / f"{f}.gz") if p.is_file()), None) for f in FILES]
        if None in found:
            continue
        arrays = [read_idx(path) for path in found if path]
        for array in arrays:
            digest.update(repr(array.shape).encode() + array.tobytes())
        splits = []
        for x, y in (arrays[:2], arrays[2:]):
            if len(x) != len(y):
                raise ValueError(f"{folder}: expected as many labels as images, got {len(x)} images, {len(y)} labels")
            splits.append(Split(torch.from_numpy(x).float().div_(255).unsqueeze(1), torch.from_numpy(y).long()))
        train, test = splits
        return Dataset("mnist", train, test, tuple("0123456789"), digest.hexdigest())
    raise FileNotFoundError(f"root: expected {', '.join(FILES)} (or .gz) in one of {', '.join(map(str, folders))}")


@torch.no_grad()
def as_published(model: nn.Module, split: Split, *, batch_size: int = 1000) -> float:
    """Accuracy in % with dropout *on*, as the published script measures it. The model's modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        pairs = zip(split.x.split(batch_size), split.y.split(batch_size), strict=True)
        right = [(model(x).argmax(-1) == y).sum() for x, y in pairs]
    finally:
        for module, training in modes:
            module.training = training
    return 100 * float(torch.stack(right).sum()) / len(split.y)


def run_at_scale(
    tasks: Sequence[Task],
    methods: Mapping[str, Method],
    *,
    model: Callable[[], nn.Module] = PaperCNN,
    epochs: Sequence[int] = (4, 1),
    batch_size: int = 32,
    seeds: Iterable[int] = (0,),
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Learn two tasks one after the other, with each method and seed.

    Args:
        tasks: two, of :func:`peftref.continual.core.streams.domain_incremental`.
        methods: name -> :class:`Method`.
        model: makes a network; called under the seed, so all methods start from the same one.
        epochs: of each task (4 and 1: published).
        batch_size: 32: published.
        seeds: of the network, the order of the batches and dropout.
        device: default: a GPU if there is one.

    Returns:
        One row per method and seed; ``attrs["protocol"]`` says what was run, for the results file.
    """
    if len(tasks) != 2 or len(epochs) != 2:
        raise ValueError(f"tasks, epochs: expected two of each, got {len(tasks)} and {len(epochs)}")
    device = pick_device(device)
    seeds = list(seeds)
    first, second = (task.to(device) for task in tasks)
    rows = {}
    for name, method in methods.items():
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                net = model().to(device)
                rule = method.rule()
                optimizer = method.optimizer(net.parameters())
                generator = torch.Generator().manual_seed(seed)
                _learn(net, rule, optimizer, 0, first, batch_size, epochs[0], generator)
                before = evaluate(net, [first])[0]
                method.switch(optimizer)
                _learn(net, rule, optimizer, 1, second, batch_size, epochs[1], generator)
                after = evaluate(net, [first, second])
                published = [as_published(net, task.train) for task in (first, second)]
            rows[name, seed] = [before.item(), *after.tolist(), *published]
    found = pd.DataFrame(rows, index=COLUMNS).T.rename_axis(["method", "seed"])
    found.attrs["protocol"] = protocol(
        device,
        train=[len(task.train.y) for task in tasks],
        test=[len(task.test.y) for task in tasks],
        epochs=list(epochs),
        batch_size=batch_size,
        methods=list(methods),
        seeds=seeds,
    )
    return found


def _learn(
    net: nn.Module,
    rule: FineTune,
    optimizer: torch.optim.Optimizer,
    number: int,
    task: Task,
    batch_size: int,
    epochs: int,
    generator: torch.Generator,
) -> None:
    """One task; the network is left in eval mode."""
    rule.begin_task(number, task.classes.stop)
    net.train()
    for x, y in batches(task.train, batch_size, epochs=epochs, generator=generator):
        optimizer.zero_grad()
        rule.loss(net, x, y).backward()
        optimizer.step()
        rule.observe(x, y)
    net.eval()
    rule.end_task(net, *task.train)
