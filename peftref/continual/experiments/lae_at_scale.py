r"""LAE with a large backbone: what the guarded cell of the chapter runs.

The protocol of the published code (``gqk/LAE@1680e49:config/base/cifar100_order1.yaml``) for CIFAR-100: images of 32
pixels enlarged to the backbone's size, a random crop and flip for training, 256 pixels and the middle 224 for testing,
values in [0, 1] *without* mean and standard deviation; classes in their stored order, batches of 24, a constant
learning rate of 0.0028125; modules in the first five blocks. Accuracy is over the test images of all classes seen.

>>> from peftref.data import load
>>> from peftref.models.vit import pretrained_vit
>>> options = {"tasks": 5, "blocks": [0], "size": 28, "limit": 24, "epochs": 1, "frozen_epochs": 0, "device": "cpu"}
>>> with torch.random.fork_rng():
...     table = run_at_scale(pretrained_vit(), load("mnist5k"), "LoRA", **options)
>>> table.columns.tolist(), len(table)
(['online (%)', 'offline (%)', 'ensemble (%)'], 5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.core.injection import inject
from ...at_scale import first_of_each, pick_device, protocol, random_crop
from ...data import Dataset, Split
from ..core.prefix import inject_prefix
from ..core.small_modules import KVLoRA, ParallelAdapter
from ..core.streams import class_incremental
from ..lae import LAE, vote

__all__ = ["Centred", "PETS", "run_at_scale"]

PETS: dict[str, Callable[[nn.Module, str], object]] = {
    "Adapter": lambda net, attn: inject(net, ParallelAdapter, attn, name="online"),
    "LoRA": lambda net, attn: inject(net, KVLoRA, attn + r"\.qkv", name="online"),
    "Prefix": lambda net, attn: inject_prefix(net, attn, name="online"),
}


class Centred(nn.Module):
    """A backbone of ``size`` pixels that takes other images: enlarged to 8 / 7 of it, then cut to the middle.

    Images of its own size pass as they are.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model: Any = model  # speaks timm's protocol, of which nn.Module says nothing
        self.size = size
        self.num_features = model.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            large = round(self.size * 8 / 7)  # 224: 256
            start = (large - self.size) // 2
            x = F.interpolate(x, (large, large), mode="bilinear", antialias=True)
            x = x[..., start : start + self.size, start : start + self.size]
        h: Tensor = self.model.forward_features(x)
        return h

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        h = self.model.forward_head(h, pre_logits=pre_logits)
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def run_at_scale(
    model: nn.Module,
    data: Dataset,
    pet: str = "Adapter",
    *,
    tasks: int = 10,
    blocks: Sequence[int] = range(5),
    size: int = 224,
    alpha: float = 0.9999,
    lr: float = 0.0028125,
    epochs: int = 5,
    frozen_epochs: int = 3,
    batch_size: int = 24,
    augmented: bool = True,
    limit: int | None = None,
    test_limit: int | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """One stream, from the first task to the last.

    Args:
        model: pre-trained, with timm's names; it gets the small modules.
        data: for example ``load("cifar100", root)``.
        pet: one of :data:`PETS`.
        tasks: number of tasks (10: paper).
        blocks: which of the model's blocks get a module (the first five: official configuration).
        size: side of the images that the model takes.
        alpha: of the offline copy (official configuration for CIFAR-100, as the next four).
        lr: of head and module.
        epochs: of a task.
        frozen_epochs: the first of them, from the second task on.
        batch_size: of a step.
        augmented: random crops (official); without them frozen epochs compute features once.
        limit: training images of each class (all).
        test_limit: test images of each class (all).
        device: default: a GPU if there is one.
        seed: of the order of the batches, the crops and the heads.

    Returns:
        One row per task; ``attrs["protocol"]`` says what was run, for the results file.

    Raises:
        ValueError: an unknown module, or no such blocks.
    """
    if pet not in PETS:
        raise ValueError(f"pet: expected one of {list(PETS)}, got {pet!r}")
    device = pick_device(device)
    PETS[pet](model.eval(), rf"blocks\.({'|'.join(map(str, blocks))})\.attn")
    learner = LAE(Centred(model, size).to(device), alpha=alpha, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    seen = []
    augment = (lambda x: random_crop(x, size, generator)) if augmented else None
    for t, task in enumerate(class_incremental(data, tasks, per_class=limit)):
        task = task.to(device)
        learner.begin_task(len(task.classes))
        learner.learn(
            task.train,
            generator=generator,
            epochs=epochs,
            frozen_epochs=frozen_epochs if t else 0,
            batch_size=batch_size,
            augment=augment,
        )
        if test_limit is not None:
            kept = first_of_each(task.test.y, test_limit)
            task = task._replace(test=Split(task.test.x[kept], task.test.y[kept]))
        seen.append(task.test)
        rows.append(_accuracies(learner, seen))
    table = pd.DataFrame(rows, columns=["online (%)", "offline (%)", "ensemble (%)"])
    table.index = pd.RangeIndex(1, len(rows) + 1, name="tasks learned")
    table.attrs["protocol"] = protocol(
        device,
        data=data.name,
        sha256=data.sha256,
        pet=pet,
        tasks=tasks,
        blocks=list(blocks),
        size=size,
        alpha=alpha,
        lr=lr,
        epochs=epochs,
        frozen_epochs=frozen_epochs,
        batch_size=batch_size,
        augmented=augmented,
        limit=limit,
        seed=seed,
    )
    return table


def _accuracies(learner: LAE, splits: Sequence[Split]) -> list[float]:
    right = torch.zeros(3, dtype=torch.double)
    count = 0
    for x, y in ((x, y) for s in splits for x, y in zip(s.x.split(100), s.y.split(100), strict=True)):
        logits = learner.experts(x)
        found = torch.stack([logits[0], logits[-1], vote(logits)]).argmax(-1)
        right = right + (found == y).sum(1).cpu()
        count = count + len(y)
    return (100 * right / count).tolist()
