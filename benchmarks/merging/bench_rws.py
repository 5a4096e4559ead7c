"""Robust weight signatures: extraction against the published forms, switching a patch against loading weights.

The checkpoints have the shapes of VGG-16's 13 convolutions (14.7 million weights) and random entries: time and memory
depend on shapes alone. Each row first checks that both sides give the same numbers.
"""

from __future__ import annotations

import copy

import timm
import torch
from torch import Tensor

from benchmarks._timing import Row, bytes_floor, compare
from peftref.merging import Patched, first, signature, units
from tests._naive.rws import published_signature, vector_signature

PROJECTOR = "d x d projector of the published code (tests/_naive/rws.py)"
VECTOR = "two dot products, tensor by tensor (tests/_naive/rws.py)"
FLOOR = "one operation that reads three checkpoints and writes one"
WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG16 = {
    f"{i}.{kind}": shape
    for i, (a, b) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))
    for kind, shape in (("weight", (b, a, 3, 3)), ("bias", (b,)))
}
# A projector of the second convolution, 36864 x 36864 numbers, takes 5.4 GB: this is what fits.
SMALL = {"0.weight": (64, 3, 3, 3), "0.bias": (64,), "1.weight": (24, 16, 3, 3), "1.bias": (24,)}


def checkpoints(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """Pretrained, clean and robust weights; the last two share half of their change."""
    g = torch.Generator().manual_seed(0)
    zero, task, noise = ({k: 0.05 * torch.randn(s, generator=g) for k, s in shapes.items()} for _ in range(3))
    clean = {k: v + 0.1 * task[k] for k, v in zero.items()}
    return [zero, clean, {k: v + 0.1 * (task[k] + noise[k]) for k, v in zero.items()}]


def extraction(claim: str, shapes: dict[str, tuple[int, ...]], peer, name: str, target: float | None = None) -> Row:
    states, names = checkpoints(shapes), list(shapes)

    def ours() -> dict[str, Tensor]:
        return signature(*states, names)

    if peer is not floor:
        torch.testing.assert_close(ours(), peer(*states, names), rtol=0, atol=1e-6)  # entries of order 1e-2, float32
    size = sum(t.nbytes for t in states[0].values())
    least = bytes_floor(4 * size) if size > 1e7 else None  # three checkpoints read, one written; small ones stay cached
    return compare(claim, ours, lambda: peer(*states, names), peer_name=name, target=target, floor=least)


def floor(zero: dict[str, Tensor], clean: dict[str, Tensor], robust: dict[str, Tensor], names: list[str]) -> object:
    """The least memory traffic that any extraction has: every input read once, the result written once."""
    return [torch.addcmul(robust[n], zero[n], clean[n], value=0.1) for n in names]


def switching(claim: str, k: int, published: str, target: float | None = None) -> Row:
    """A patch put on and taken off a ResNet-18 of 11.7 million parameters, or its weights brought in twice."""
    model = timm.create_model("resnet18").eval()
    host = {n: t.clone() for n, t in model.state_dict().items()}
    g = torch.Generator().manual_seed(0)
    patch = {n: 0.01 * torch.randn(host[n].shape, generator=g) for n in first(units(model), k)}
    patched, switch = host | {n: host[n] + p for n, p in patch.items()}, Patched(model, patch)

    def ours() -> None:
        switch.on()
        switch.off()

    def peer() -> object:
        if published == "load":
            model.load_state_dict(patched)
            return model.load_state_dict(host)
        other = copy.deepcopy(model)
        return other.load_state_dict(patched)

    switch.on()
    assert all(torch.equal(t, patched[n]) for n, t in model.state_dict().items())
    switch.off()
    assert all(torch.equal(t, host[n]) for n, t in model.state_dict().items())
    what = {"load": "load_state_dict of patched, then of clean weights", "copy": "deepcopy, then load_state_dict"}
    return compare(claim, ours, peer, peer_name=what[published], target=target, warmup=3, repeats=15)


def rows() -> list[Row]:
    return [
        extraction("extract from 5 k weights", SMALL, published_signature, PROJECTOR, target=10.0),
        extraction("extract from VGG-16's 14.7 M", VGG16, vector_signature, VECTOR),
        extraction("extract from VGG-16's 14.7 M", VGG16, floor, FLOOR),
        switching("patch on and off, stem and 4 blocks of 11.7 M", 5, "load", target=5.0),
        switching("patch on and off, all 11.2 M outside the head", 9, "load"),
        switching("patch on and off, all 11.2 M outside the head", 9, "copy"),
    ]
