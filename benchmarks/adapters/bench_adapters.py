"""Every adapter of the part against PEFT's LoRA: one training step of a transformer block, of width 768 and 2048.

The sizes are those of the part's introduction, about as many trained numbers as LoRA where a method leaves the choice.
The two sides compute different functions, but for LoRA itself, which must be equal.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import nn

from benchmarks._timing import Row, one_thread
from benchmarks.adapters._step import BATCH, HEADS, TARGETS, TOKENS, WIDE, WIDTH, block, step_row, stir, tokens
from peftref.adapters.adaptformer import AdaptFormer
from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.bone import Bone
from peftref.adapters.core.injection import adapters, inject
from peftref.adapters.hydra import Hydra
from peftref.adapters.tera import Bank, TeRA
from peftref.adapters.tlora import TLoRA
from peftref.adapters.vl_adapter import VLAdapter

METHODS: dict[str, Callable[[nn.Module], object]] = {  # EVA trains as LoRA does
    "LoRA, r = 8": lambda net: inject(net, LoRA, TARGETS, r=8, lora_alpha=8),
    "Bone, r = 16": lambda net: inject(net, Bone, TARGETS, r=16),
    "Bone without guide, r = 16": lambda net: inject(net, Bone, TARGETS, r=16, variant="bone"),
    "Hydra, 4 + 4": lambda net: inject(net, Hydra, TARGETS, r_par=4, r_seq=4),
    "TLoRA(2, 4)": lambda net: inject(net, TLoRA, TARGETS, transform_rank=2, residual_rank=4),
    "TeRA": lambda net: inject(net, TeRA, TARGETS, bank=Bank()),
    "TeRA, both sides split": lambda net: inject(net, TeRA, TARGETS, out_modes=2, bank=Bank()),
    "AdaptFormer, 64": lambda net: inject(net, AdaptFormer, ["0"], bottleneck=64, dropout=0.0),
    "VL-Adapter, r = 32": lambda net: inject(net, VLAdapter, ["proj", "fc2"], reduction=width(net) / 32),
}
SIZES = ((WIDTH, HEADS, BATCH), (WIDE, 16, 2))


def width(net: nn.Module) -> int:
    return net[0].norm1.normalized_shape[0]


def lora(size: int, heads: int) -> nn.Module:
    config = peft.LoraConfig(target_modules=TARGETS, r=8, lora_alpha=8)
    return stir(peft.inject_adapter_in_model(config, block(size, heads)))


def like(theirs: nn.Module, ours: nn.Module) -> None:
    """PEFT's weights in our LoRA."""
    with torch.no_grad():
        for name, adapter in adapters(ours).items():
            layer = theirs.get_submodule(name)
            adapter.lora_A.weight.copy_(layer.lora_A["default"].weight)
            adapter.lora_B.weight.copy_(layer.lora_B["default"].weight)


@one_thread()
def rows(sizes: tuple[tuple[int, int, int], ...] = SIZES) -> list[Row]:
    found = []
    for size, heads, batch in sizes:
        x, peer = tokens(size, batch, TOKENS), lora(size, heads)
        for name, build in METHODS.items():
            net, same = block(size, heads), name.startswith("LoRA")
            build(net)
            like(peer, net) if same else stir(net)
            found.append(
                step_row(
                    f"{name}, width {size}", net, peer, peer_name="PEFT's LoRA, r = 8", x=x, equal=same, repeats=3,
                    target=1.0 if same else None,
                )
            )  # fmt: skip
    return found
