"""AdaptFormer: one training step of a ViT-B/16 block, against the authors' block, the block alone, and PEFT's LoRA.

Our block listens to the stream through a shallow copy of a block that stays as it is; the authors have written the
block anew, with the bottleneck in its ``forward``. The two are compared first, and must be equal.
"""

from __future__ import annotations

import peft
from torch import Tensor, nn

from benchmarks._timing import Row
from benchmarks.adapters._step import HEADS, TARGETS, WIDTH, block, step_row, stir, tokens
from peftref.adapters.adaptformer import AdaptFormer
from peftref.adapters.core.injection import adapters, inject

AUTHORS = "the authors' block: the bottleneck inside its forward"


class Published(nn.Module):
    """The forward of ``models/custom_modules.py`` and ``models/adapter.py``, on the same frozen layers and weights."""

    def __init__(self, block: nn.Module, adapter: AdaptFormer) -> None:
        super().__init__()
        self.block, self.adapter = block, adapter

    def forward(self, x: Tensor) -> Tensor:
        block, adapter = self.block, self.adapter
        x = x + block.attn(block.norm1(x))
        side = adapter.up_proj(adapter.down_proj(x).relu()) * adapter.s
        z = block.mlp(block.norm2(x))
        if adapter.placement == "sequential":
            side = adapter.up_proj(adapter.down_proj(z).relu()) * adapter.s
        return x + (z + side)


def ours(width: int = WIDTH, heads: int = HEADS, **options) -> nn.Module:
    net = block(width, heads).eval()
    inject(net, AdaptFormer, ["0"], **options)
    return stir(net)


def lora(width: int = WIDTH, heads: int = HEADS, r: int = 8) -> nn.Module:
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS)
    return stir(peft.get_peft_model(block(width, heads), config))


def rows(width: int = WIDTH, heads: int = HEADS, batch: int = 32, length: int = 197) -> list[Row]:
    x, size = tokens(width, batch, length), (width, heads)
    net = ours(*size)
    published = Published(net[0].base_layer, adapters(net)["0"])  # the same weights
    alone = block(*size).eval()
    eight = f"PEFT's LoRA, r = 8 on {len(TARGETS)} matrices: as many weights"
    return [
        step_row("parallel, bottleneck 64", net, published, peer_name=AUTHORS, target=0.9, x=x),
        step_row("parallel, bottleneck 64", net, alone, peer_name="the frozen block", x=x, equal=False),
        step_row("parallel, bottleneck 64", net, lora(*size), peer_name=eight, target=1.0, x=x, equal=False),
    ]
