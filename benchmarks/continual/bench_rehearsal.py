"""Rehearsal and EWC against the plain forms: three forward passes, a buffer filled one by one, a sample at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks._timing import Row, compare, counted_flops, flops_floor
from peftref.continual.baselines.ewc import diagonal_fisher
from peftref.continual.baselines.rehearsal import DERpp
from peftref.continual.core.replay import Reservoir
from peftref.models import PlainCNN
from tests._naive.ewc import loop_fisher
from tests._naive.rehearsal import LoopReservoir


def images(n: int, seed: int = 0, side: int = 28, channels: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, side, side, generator=g), torch.randint(10, (n,), generator=g)


def step(model: nn.Module, forwards: str, x: Tensor, y: Tensor) -> Callable[[], list[Tensor]]:
    """Loss and gradients of a DER++ step whose buffer is full; every call draws the same samples."""
    rule = DERpp(Reservoir(200), 10, forwards=forwards)
    old, labels = images(200, 1, x.shape[-1], x.shape[1])
    rule.buffer.add(old, labels, torch.zeros(200, 10))
    state = rule.buffer.generator.get_state()

    def run() -> list[Tensor]:
        rule.buffer.generator.set_state(state)
        return [*torch.autograd.grad(rule.loss(model, x, y), [*model.parameters()])]

    return run


def derpp(claim: str, model: nn.Module, side: int, channels: int) -> Row:
    x, y = images(10, side=side, channels=channels)
    one, each = step(model, "one", x, y), step(model, "each", x, y)
    for a, b in zip(one(), each(), strict=True):  # no BatchNorm in train mode: the same gradients, in float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    least = flops_floor(counted_flops(one))
    name = "one forward pass for each of the three batches"
    return compare(claim, one, each, peer_name=name, floor=least, repeats=15)


def reservoir(n: int, size: int, batch: int) -> Row:
    x, y = images(n, side=8)
    parts = list(zip(x.split(batch), y.split(batch), strict=True))

    def ours() -> Reservoir:
        buffer = Reservoir(size)
        for part in parts:
            buffer.add(*part)
        return buffer

    def peer() -> LoopReservoir:
        buffer = LoopReservoir(size)
        for xs, ys in parts:
            buffer.add([*zip(xs, ys, strict=True)])
        return buffer

    images_of, labels_of = zip(*peer().slots, strict=True)
    assert torch.equal(ours().rows[0], torch.stack(images_of)) and torch.equal(ours().rows[1], torch.stack(labels_of))
    return compare(f"reservoir, {n} samples in batches of {batch}", ours, peer, peer_name="one sample at a time")


def fisher(n: int, exact: bool) -> Row:
    model = PlainCNN(width=8).eval()
    (x, y) = images(n)
    target = None if exact else y

    def ours() -> dict[str, Tensor]:
        return diagonal_fisher(model, x, target)

    def peer() -> dict[str, Tensor]:
        return loop_fisher(model, x, target)

    for name, f in peer().items():
        torch.testing.assert_close(ours()[name], f, rtol=1e-3, atol=1e-7)
    claim = f"{'exact' if exact else 'empirical'} Fisher, {n} samples"
    promised = None if exact else 2.0
    least = flops_floor(counted_flops(peer))  # the same for all at once
    return compare(claim, ours, peer, peer_name="a backward pass per sample", repeats=5, target=promised, floor=least)


def rows() -> list[Row]:
    import timm

    torch.manual_seed(0)
    resnet = timm.create_model("resnet18", num_classes=10).eval()  # eval mode: BatchNorm does not mix the batches
    return [
        derpp("DER++ step, small network, 10+10+10", PlainCNN(width=16), 28, 1),
        derpp("DER++ step, ResNet-18, 10+10+10", resnet, 32, 3),
        reservoir(6000, 200, 10),
        reservoir(6000, 200, 1000),
        fisher(200, exact=False),
        fisher(50, exact=True),
    ]
