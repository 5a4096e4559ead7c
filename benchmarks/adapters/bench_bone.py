"""Bone: one training step against PEFT's MiSS with the same blocks, against PEFT's LoRA, and against autograd.

PEFT puts the guided update into the weight, so that the layer multiplies once where ours, which adds to the frozen
output, multiplies twice. Autograd is our formula without the backward pass written by hand.
"""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._timing import Row
from benchmarks.adapters._step import HEADS, TARGETS, WIDTH, block, step_row, stir, tokens
from peftref.adapters.bone import Bone, bat, tiles
from peftref.adapters.core.injection import adapters, inject
from peftref.adapters.core.layers import Layer

SIZE = {"width": WIDTH, "heads": HEADS}


class ByAutograd(Bone):
    """The guided update as a graph of operations, which keeps what it makes of the weight."""

    kind = "bench_bone_autograd"

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return F.linear(x, bat(base.weight, self.miss_block))

    def whole(self, x: Tensor, base: Layer) -> Tensor:
        return F.linear(x, base.weight + bat(base.weight, self.miss_block), base.bias)


class ByMatrix(Bone):
    """The pooled form as a LoRA whose first matrix is the frozen tiles."""

    kind = "bench_bone_matrix"

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return F.linear(F.linear(x, tiles(self.r, base.in_features)), self.miss_block.T)


def ours(size: dict[str, int], r: int, kind: type[Bone] = Bone, **options: str) -> nn.Module:
    model = block(**size)
    inject(model, kind, TARGETS, r=r, **options)
    return stir(model)


def theirs(size: dict[str, int], r: int, twin: nn.Module, init: str | bool) -> nn.Module:
    """PEFT's, with the same blocks."""
    model = peft.inject_adapter_in_model(peft.MissConfig(target_modules=TARGETS, r=r, init_weights=init), block(**size))
    with torch.no_grad():
        for name, adapter in adapters(twin).items():
            model.get_submodule(name).miss_block["default"].copy_(adapter.miss_block)
    return model


def lora(size: dict[str, int], r: int) -> nn.Module:
    return stir(peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS, r=r, lora_alpha=r), block(**size)))


def rows(size: dict[str, int] = SIZE, x: Tensor | None = None, r: int = 64) -> list[Row]:
    x = tokens() if x is None else x
    guided, plain = ours(size, r), ours(size, r, variant="bone")
    what = f"training step, block of ViT-B/16, r = {r}"
    return [
        step_row(f"{what}, guided", guided, theirs(size, r, guided, "bat"), peer_name="PEFT's MiSS, 'bat'", x=x),
        step_row(f"{what}, guided", guided, ours(size, r, ByAutograd), peer_name="the same by autograd", x=x),
        step_row(f"{what}, pooled", plain, theirs(size, r, plain, True), peer_name="PEFT's MiSS", x=x, target=1.0),
        step_row(f"{what}, pooled", plain, ours(size, r, ByMatrix, variant="bone"),
                 peer_name="a matrix product with the tiles", x=x),
        step_row(f"{what}, pooled", plain, lora(size, r // 2),
                 peer_name=f"PEFT's LoRA, r = {r // 2}", x=x, equal=False),
    ]  # fmt: skip
