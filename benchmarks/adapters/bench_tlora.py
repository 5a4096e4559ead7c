"""TLoRA: one training step against the two obvious ways to compute it, and against PEFT's adapters of its kind.

The obvious ways: put every token through the ring, core by core, as the method is written; or form the dense weight
with one einsum over all cores. Both give the same numbers. PEFT has no TLoRA; its OFT transforms the weight as well (by
orthogonal blocks), and its LoRA of rank 4 has about as many parameters.
"""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._timing import Row
from benchmarks.adapters._step import HEADS, TARGETS, WIDTH, block, step_row, stir, tokens
from peftref.adapters.core.host import Host
from peftref.adapters.core.injection import inject
from peftref.adapters.core.layers import Layer
from peftref.adapters.tlora import TLoRA

SIZE = {"width": WIDTH, "heads": HEADS}


class CoreByCore(TLoRA):
    """Every token through the transform's and the residual's cores, one after the other."""

    kind = "bench_tlora_cores"

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        a, b = self.A
        modes = x.unflatten(-1, (len(a), len(b)))
        z = torch.einsum("...jl,klba->...jkba", modes, b)
        z = torch.einsum("...jkba,ijab->...ik", z, a).flatten(-2)
        s = torch.einsum("...jl,jab,lbc->...ac", modes, *self.C)
        dy = torch.einsum("iab,kbc,...ca->...ik", *self.B, s).flatten(-2)
        return F.linear(z - x, base.weight) + dy


class Dense(TLoRA):
    """The dense change of the weight, by one einsum for each ring."""

    kind = "bench_tlora_dense"

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        a, b = self.A
        T = torch.einsum("ijab,klba->ikjl", a, b).reshape(2 * [base.in_features])
        ring = torch.einsum("iab,kbc,jcd,lda->ikjl", *self.B, *self.C).reshape(base.weight.shape)
        return F.linear(x, base.weight @ T - base.weight + ring)


def adapted(kind: type[TLoRA], size: dict[str, int], **options: int) -> nn.Module:
    model = block(**size)
    torch.manual_seed(0)
    inject(model, kind, TARGETS, **options)
    return stir(model)


def hugging(config: peft.PeftConfig, size: dict[str, int]) -> nn.Module:
    return stir(peft.inject_adapter_in_model(config, block(**size)))


def rows(size: dict[str, int] = SIZE, x: Tensor | None = None) -> list[Row]:
    x = tokens() if x is None else x
    ours = adapted(TLoRA, size)
    assert sum(isinstance(m, Host) for m in ours.modules()) == 4
    oft = peft.OFTConfig(target_modules=TARGETS, oft_block_size=32, r=0, use_cayley_neumann=False)
    lora = peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=4)
    what = "training step, block of ViT-B/16, TLoRA(2, 6)"
    return [
        step_row(what, ours, adapted(CoreByCore, size), peer_name="every token through the ring, core by core", x=x),
        step_row(what, ours, adapted(Dense, size), peer_name="dense weight, one einsum for each ring", x=x),
        step_row(what, ours, hugging(oft, size), peer_name="PEFT's OFT, blocks of 32", x=x, equal=False),
        step_row(what, ours, hugging(lora, size), peer_name="PEFT's LoRA, r = 4", x=x, equal=False),
    ]
