"""A step of CLASSP against torch's AdaGrad (foreach), and against the published code's one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torch.testing import assert_close

from benchmarks._timing import Row, bytes_floor, compare
from peftref.continual.classp import CLASSP
from tests._naive.classp import published_paper_step, published_step

ADAGRAD = "torch.optim.Adagrad(foreach=True)"
PUBLISHED = "form of the published code (tests/_naive/classp.py)"
BOOLEAN = "the same with the paper's gate, by boolean indexing (tests/_naive/classp.py)"


def parameters(name: str) -> list[Tensor]:
    """Weights with gradients, in the shapes of a ResNet-18 (11.7 million) or a block of a ViT-B/16 (7.1 million)."""
    if name == "ResNet-18":
        with torch.device("meta"):
            shapes = [p.shape for p in torchvision.models.resnet18().parameters()]
    else:
        shapes = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), *[(768,)] * 5]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    g = torch.Generator().manual_seed(0)
    for shape in shapes:
        p = torch.randn(shape, generator=g).to(device).requires_grad_()
        p.grad = torch.randn(shape, generator=g).to(device)
        found.append(p)
    return found


def against_adagrad(name: str, power: float, threshold: float = 0.0, target: float | None = None) -> Row:
    ours = parameters(name)
    theirs = parameters(name)
    optimizer = CLASSP(ours, lr=1e-3, power=power, threshold=threshold, epsilon=1e-5)
    peer = torch.optim.Adagrad(theirs, lr=1e-3, eps=0, initial_accumulator_value=1e-5, foreach=True)
    if power == 2 and threshold == 0:
        for _ in range(3):
            optimizer.step()
            peer.step()
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    claim = f"{name}, p={power:g}, tau={threshold:g}"
    floor = bytes_floor(5 * 4 * sum(p.numel() for p in ours))  # w, g and s are read, w and s written, in float32
    return compare(claim, optimizer.step, peer.step, peer_name=ADAGRAD, target=target, floor=floor, repeats=15)


def against_published(
    name: str,
    step: Callable[..., None],
    peer_name: str,
    power: float,
    threshold: float,
    mode: str = "paper",
) -> Row:
    ours = parameters(name)
    theirs = parameters(name)
    settings = {"lr": 1e-3, "power": power, "threshold": threshold}
    optimizer = CLASSP(ours, **settings, epsilon=1e-5, mode=mode)
    sums = [torch.zeros_like(p) for p in theirs]

    @torch.no_grad()
    def peer() -> None:
        step(theirs, [p.grad for p in theirs], sums, **settings, eps=1e-5)

    for _ in range(3):
        optimizer.step()
        peer()
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    claim = f"{name}, {mode} mode, p={power:g}, tau={threshold:g}"
    return compare(claim, optimizer.step, peer, peer_name=peer_name, repeats=7)


def rows() -> list[Row]:
    return [
        against_adagrad("ResNet-18", 2, target=0.8),
        against_adagrad("ResNet-18", 1, target=0.7),  # |g| needs a pass of its own
        against_adagrad("ResNet-18", 1, 0.25),
        against_adagrad("ViT-B/16 block", 2, target=0.8),
        against_adagrad("ViT-B/16 block", 1, target=0.7),
        against_published("ResNet-18", published_step, PUBLISHED, 1, 0.5, "official"),
        against_published("ViT-B/16 block", published_step, PUBLISHED, 2, 0.5, "official"),
        against_published("ResNet-18", published_paper_step, BOOLEAN, 1, 0.25),
    ]
