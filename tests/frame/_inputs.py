"""What a valid call is made of, in more than one part: tensors, small networks, data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftref import adapters, data, models

Call = tuple[Callable[..., Any], dict[str, Any]]


def t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def fixed(make: Callable[[], Any]) -> Any:
    """Made from one seed, so that two calls get equal models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def mlp() -> nn.Sequential:
    return fixed(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))


def normed() -> nn.Sequential:
    return fixed(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))


def cnn() -> models.SmallCNN:
    return fixed(lambda: models.SmallCNN(width=4, num_classes=4))


def small_vit() -> models.ViT:
    return fixed(lambda: models.ViT(14, 7, 1, 4, embed_dim=8, depth=1, num_heads=2))


def base() -> adapters.Layer:
    return adapters.view(fixed(lambda: nn.Linear(6, 4)))


def labels(n: int = 8, classes: int = 4) -> Tensor:
    return torch.arange(n) % classes


def split(n: int = 16) -> data.Split:
    return data.Split(t(n, 1, 8, 8).sigmoid(), labels(n))


def rows_split(n: int = 16) -> data.Split:
    return data.Split(t(n, 6), labels(n))


def toy(_: int = 0) -> nn.Module:
    """Stands for :func:`peftref.adapters.experiments.transfer.fresh`: small, with a ``head``."""
    return fixed(lambda: Headed())


def listing(make: Callable[..., Iterator[Any]]) -> Callable[..., list[Any]]:
    return lambda **arguments: list(make(**arguments))


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x).relu()

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        return h if pre_logits else self.head(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def stream() -> data.Stream:
    n = 12
    zeros = torch.zeros(n, dtype=torch.long)
    return data.Stream(t(n, 6), labels(n), zeros, zeros + 5, zeros, ("one",), 4)


def adapted_toy() -> nn.Module:
    net = toy()
    adapters.inject(net, adapters.LoRA, ["body"], name="online", r=2)
    return net


def pictures(n: int = 3) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=gen())
