"""AdaB2N against ``nn.BatchNorm2d`` and against the layer as it was published, and in a step of DER++.

On one thread: the smaller batch is too little work to share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks._timing import Row, compare, counted_flops, flops_floor, one_thread
from peftref.continual.adab2n import AdaB2N, adaptation_loss, balance, begin_task, convert, task_batch
from peftref.continual.baselines.rehearsal import DERpp
from peftref.continual.core.replay import Reservoir
from peftref.continual.core.streams import class_incremental
from peftref.data import load
from peftref.models import SmallCNN
from tests._naive.adab2n import PublishedAdaB2N

IDS = torch.arange(30) % 2  # two tasks, half of the batch each


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g).requires_grad_(), torch.randn(shape, generator=g)


def ours_on(layer: nn.BatchNorm2d, tasks: int) -> AdaB2N:
    made = AdaB2N(copy.deepcopy(layer), tasks, kappa=0.5)
    begin_task(made, tasks - 1)
    return made


def against_batchnorm(shape: tuple[int, ...], repeats: int) -> Row:
    """One task, where both outputs agree; the layer does all that it does with several."""
    x, g = batch(shape)
    peer = nn.BatchNorm2d(shape[1])
    ours = ours_on(peer, 1)
    ids = torch.zeros(len(x), dtype=torch.long)

    def step_ours() -> Tensor:
        with task_batch(ours, ids):
            y = ours(x)
        y.backward(g)
        return y

    def step_peer() -> Tensor:
        y = peer(x)
        y.backward(g)
        return y

    def input_gradient(step: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        x.grad = None
        return step().detach(), x.grad

    for a, b in zip(input_gradient(step_ours), input_gradient(step_peer), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
    claim = "forward and backward, " + " x ".join(map(str, shape))
    return compare(claim, step_ours, step_peer, peer_name="nn.BatchNorm2d", target=0.5, warmup=5, repeats=repeats)


def against_published(shape: tuple[int, ...], repeats: int) -> Row:
    x, g = batch(shape)
    start = nn.BatchNorm2d(shape[1])
    ours = ours_on(start, 2)
    peer = PublishedAdaB2N(copy.deepcopy(start), 2, kappa=0.5)
    peer.task = 1
    peer.ids = IDS

    def step_ours() -> Tensor:
        with task_batch(ours, IDS):
            y = ours(x)
        torch.autograd.backward([y, 0.1 * adaptation_loss(ours)], [g, torch.tensor(1.0)])
        return y

    def step_peer() -> Tensor:
        y = peer(x)
        torch.autograd.backward([y, 0.1 * peer.loss], [g, torch.tensor(1.0)])
        return y

    assert_close(step_ours(), step_peer(), rtol=1e-4, atol=1e-5)
    assert_close(ours.psi.grad, peer.psi.grad, rtol=1e-3, atol=1e-4)
    claim = "forward and backward with the loss, " + " x ".join(map(str, shape))
    name = "the published layer (tests/_naive/adab2n.py)"
    return compare(claim, step_ours, step_peer, peer_name=name, target=1.5, warmup=5, repeats=repeats)


def a_step_of_derpp() -> Row:
    """Batches of 10 and twice 10 replayed, 28 x 28 images, five normalisation layers of 16 to 64 channels."""
    tasks = class_incremental(load("fashion8k"), 5)
    x, y = (t[:10] for t in tasks[0].train)

    def step(model: nn.Module, balanced: bool) -> Callable[[], Tensor]:
        model.train()
        rule = DERpp(Reservoir(200))
        rule.buffer.add(*(t[:200] for t in tasks[0].train), torch.zeros(200, 10))
        if balanced:
            balance(rule, model, tasks, 0.1)(0)

        def one() -> Tensor:
            model.zero_grad()
            loss = rule.loss(model, x, y)
            loss.backward()
            return loss

        return one

    plain = SmallCNN()
    ours = step(convert(copy.deepcopy(plain), 5, kappa=0.5), True)
    peer = step(plain, False)
    bare = step(convert(copy.deepcopy(plain), 5, kappa=0.5), False)
    assert_close(bare(), peer(), rtol=1e-4, atol=1e-5)  # without the loss that ties, in task 0, the same
    least = flops_floor(counted_flops(peer))  # the convolutions
    claim = "a step of DER++, SmallCNN"
    return compare(claim, ours, peer, peer_name="nn.BatchNorm2d", floor=least, warmup=5, repeats=51)


@one_thread()
def rows() -> list[Row]:
    shapes = {(30, 64, 32, 32): 15, (30, 512, 4, 4): 51}
    found = [against_batchnorm(shape, repeats) for shape, repeats in shapes.items()]
    found += [against_published(shape, repeats) for shape, repeats in shapes.items()]
    return [*found, a_step_of_derpp()]
