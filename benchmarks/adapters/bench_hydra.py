"""Hydra: one training step against the module as it is published, against the merged weight, and against PEFT's LoRA.

The peer of the first row follows the official code: every branch two linear layers of its own, on the layers of its
VTAB configuration and here on all four. The second forms the merged weight in each step, as an exact re-parametrisation
invites one to.
"""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._timing import Row
from benchmarks.adapters._step import HEADS, TARGETS, WIDTH, block, step_row, stir, tokens
from peftref.adapters.core.injection import adapters, inject
from peftref.adapters.core.layers import Layer
from peftref.adapters.hydra import Hydra

SIZE = {"width": WIDTH, "heads": HEADS}


class Published(nn.Module):
    """A layer and its two bottlenecks."""

    def __init__(self, layer: nn.Linear, twin: Hydra) -> None:
        super().__init__()
        o, i = layer.weight.shape
        p, s = twin.r_par, twin.r_seq
        self.layer, self.scale = layer, twin.scale
        self.par = nn.Sequential(nn.Linear(i, p), nn.Dropout(0.0), nn.Linear(p, o))
        self.seq = nn.Sequential(nn.Linear(o, s), nn.Dropout(0.0), nn.Linear(s, o))
        with torch.no_grad():
            self.par[0].weight.copy_(twin.par_down)
            self.seq[0].weight.copy_(twin.seq_down)
            self.par[0].bias.copy_(twin.down_bias[:p])
            self.seq[0].bias.copy_(twin.down_bias[p:])
            self.par[2].weight.copy_(twin.up[:, :p])
            self.seq[2].weight.copy_(twin.up[:, p:])
            self.par[2].bias.copy_(twin.up_bias)
            self.seq[2].bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z + self.scale * self.par(x) + self.scale * self.seq(z)


class Merged(Hydra):
    """The dense update in every step."""

    kind = "bench_hydra_merged"

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return F.linear(x, *self.delta(base))


def ours(size: dict[str, int], kind: type[Hydra] = Hydra, **options: int) -> nn.Module:
    model = block(**size)
    torch.manual_seed(0)
    inject(model, kind, TARGETS, **options)
    return stir(model)


def published(size: dict[str, int], twin: nn.Module) -> nn.Module:
    model = block(**size)
    for name, adapter in adapters(twin).items():
        parent, _, attr = name.rpartition(".")
        setattr(model.get_submodule(parent), attr, Published(model.get_submodule(name), adapter))
    return model


def lora(size: dict[str, int], r: int) -> nn.Module:
    return stir(peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS, r=r, lora_alpha=r), block(**size)))


def rows(size: dict[str, int] = SIZE, x: Tensor | None = None) -> list[Row]:
    x = tokens() if x is None else x
    model = ours(size, r_par=2, r_seq=2)
    what = "training step, block of ViT-B/16, ranks 2 + 2"
    return [
        step_row(what, model, published(size, model), peer_name="module as published", x=x, target=1.0),
        step_row(what, model, ours(size, Merged, r_par=2, r_seq=2), peer_name="merged weight in every step", x=x),
        step_row(what, model, lora(size, 4), peer_name="PEFT's LoRA, r = 4", x=x, equal=False),
    ]
