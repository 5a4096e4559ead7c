"""CoTTA against the schedule of its published code: all views of every batch, source copied twice, loops over tensors.

Both sides see the same views and draw the same masks, so that their answers agree. A view of the published side is
made as published, from the padded image; one row hands it ours, to show what the schedule alone is worth.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from benchmarks._timing import Row, bytes_floor, compare
from peftref.data import load
from peftref.data.corruptions import corrupt
from peftref.models import pretrained
from peftref.tta.core.views import View, apply_view, draw_view
from peftref.tta.cotta import CoTTA
from tests._naive.cotta import PublishedCoTTA, published_configure, published_ema, published_restore, published_view

PEER = "schedule of the published code (tests/_naive/cotta.py)"
BATCH = 100
# 32 views and the threshold 0.92 are the published ones. Plain SGD, because both sides then agree to rounding: where
# student and teacher agree the gradient is nothing but rounding, which Adam would divide by itself.
SETTINGS = {"optimizer": torch.optim.SGD, "lr": 1e-3}


class Uniform:
    """Draws for the masks tensor by tensor, from the sequence that ours draws in one piece."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=self.generator)


class Views:
    """Random views made by ``make``, the same sequence for every batch: views drawn in vain leave no trace."""

    def __init__(self, make: Callable[[Tensor, View], Tensor]) -> None:
        self.make, self.generator, self.batch = make, torch.Generator(), 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.data_ptr() != self.batch:
            self.batch = x.data_ptr()
            self.generator.manual_seed(0)
        return self.make(x, draw_view(tuple(x.shape[-2:]), self.generator))


def digits(*domains: str) -> list[Tensor]:
    """One batch of real digits for each name; noise leaves the source network confident, fog does not."""
    x = load("mnist5k").test.x
    return [corrupt(x[i * BATCH :][:BATCH], name, 5, seed=i) for i, name in enumerate(domains)]


def stream(claim: str, batches: list[Tensor], augmented: int, make=published_view, target: float | None = None) -> Row:
    net = pretrained("mnist5k")

    def ours() -> Tensor:
        method = CoTTA(net, views=Views(apply_view), **SETTINGS)
        return torch.stack([method(x) for x in batches])

    def peer() -> Tensor:
        method = PublishedCoTTA(net, Views(make), Uniform(), **SETTINGS)
        answers = torch.stack([method.step(x) for x in batches])
        assert sum(method.augmented) == augmented
        return answers

    torch.testing.assert_close(ours(), peer(), rtol=0, atol=1e-4)  # logits of order 10 in float32
    return compare(claim, ours, peer, peer_name=PEER, target=target, warmup=1, repeats=5)


def after_the_step() -> Row:
    """Average and restoration alone, on a ResNet-18 of 11.7 million parameters in 62 tensors."""
    net = timm.create_model("resnet18", pretrained=False)
    method = CoTTA(net)
    student, teacher = published_configure(net), published_configure(net)
    source, uniform = {k: v.clone() for k, v in student.state_dict().items()}, Uniform()
    with torch.no_grad():
        for model in (method.student, student):  # both sides start from the same shifted student
            for p in model.parameters():
                p.add_(0.1)

    def peer() -> None:
        published_ema(teacher, student, 0.999)
        published_restore(student, source, 0.01, uniform)

    method.average_and_restore(), peer()
    pairs: tuple[tuple[nn.Module, nn.Module], ...] = ((method.student, student), (method.teacher, teacher))
    for a, b in pairs:
        torch.testing.assert_close(list(a.parameters()), list(b.parameters()), rtol=1e-6, atol=1e-7)
    least = bytes_floor(3 * sum(p.nbytes for p in student.parameters()))  # student and teacher read, teacher written
    claim = "average and restore 11.7 M parameters"
    return compare(claim, method.average_and_restore, peer, peer_name=PEER, floor=least)


def rows() -> list[Row]:
    few = digits(*["gaussian_noise"] * 4, "fog", *["gaussian_noise"] * 5)
    all_ = digits("fog", "contrast")
    return [
        stream("1 batch of 10 needs its 32 views, against the published CIFAR script", few, 1, target=6.0),
        stream("all batches need their 32 views", all_, 2, target=1.0),
        stream("all need theirs, and the peer makes views as we do", all_, 2, make=apply_view),
        after_the_step(),
    ]
