"""What the benchmarks of this part share: one training step of a transformer block with an adapter on every matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks._timing import Floor, Row, compare, counted_flops, flops_floor

WIDTH, BATCH, TOKENS, HEADS = 768, 32, 197, 12  # a block of ViT-B/16
WIDE = 2048  # one step of a wider block has fewer rows, or it would take minutes
TARGETS = ["qkv", "proj", "fc1", "fc2"]


def block(width: int = WIDTH, heads: int = HEADS) -> nn.Module:
    """A frozen transformer block in a module of its own, so that whole blocks can be adapted too; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(Block(width, heads, qkv_bias=True)).requires_grad_(False)


def tokens(width: int = WIDTH, batch: int = BATCH, length: int = TOKENS) -> Tensor:
    """Inputs that carry a gradient, as they do everywhere but in the first block."""
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0), requires_grad=True)


def stir(model: nn.Module, std: float = 0.02, seed: int = 0) -> nn.Module:
    """Moves what is trained away from its start, where a factor of zero would hide half of the gradients."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn(p.shape, generator=g))
    return model


def step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; returns the output."""

    def run() -> Tensor:
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.square().mean().backward()
        return y

    return run


@cache
def least(batch: int, length: int, width: int) -> Floor:
    """What every method does: the frozen block, forward, and backward to its input. Heads do not change the count."""
    return flops_floor(counted_flops(step(block(width, 1), tokens(width, batch, length))))


def step_row(
    claim: str, ours: nn.Module, peer: nn.Module, *, peer_name: str, target: float | None = None,
    x: Tensor | None = None, equal: bool = True, repeats: int = 5,
) -> Row:  # fmt: skip
    """Time and memory of a training step of both; if they should be equal, their outputs are compared first."""
    x = tokens() if x is None else x
    if equal:
        with torch.no_grad():
            torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-4)
    return compare(
        claim, step(ours, x), step(peer, x), peer_name=peer_name, target=target, floor=least(*x.shape), warmup=1,
        repeats=repeats,
    )  # fmt: skip
