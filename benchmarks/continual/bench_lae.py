"""LAE: the prefix without an attention matrix, both experts in one batch, foreach averages, features computed once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks._timing import Row, compare, counted_flops, flops_floor
from peftref.adapters.core.injection import activate, inject
from peftref.continual.core.prefix import prefix_attention
from peftref.continual.core.small_modules import KVLoRA
from peftref.continual.lae import LAE, ema_
from peftref.data import Split
from peftref.models.vit import pretrained_vit
from tests._naive.lae import (
    materialised_lse,
    published_ema,
    published_kv_lora,
    published_prefix_attention,
)


def tensors(batch: int, heads: int, tokens: int, width: int, rows: int = 10) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, tokens, width, generator=g).unbind(0)
    return [q, k, v, *torch.randn(2, heads, rows, width, generator=g).unbind(0)]


def prefix(
    batch: int,
    heads: int,
    tokens: int,
    width: int,
    *,
    lse: bool = False,
    backward: bool = False,
    target: float | None = None,
) -> Row:
    parts = [t.requires_grad_(backward) for t in tensors(batch, heads, tokens, width)]
    peer_form = materialised_lse if lse else published_prefix_attention

    def run(form) -> Tensor:
        out = form(*parts)
        return torch.autograd.grad(out.sum(), parts)[3] if backward else out

    # float32, and sums of another order; the gradients of the keys are sums over all queries
    torch.testing.assert_close(run(prefix_attention), run(peer_form), rtol=1e-3, atol=1e-3 if backward else 1e-5)
    what = "forward and backward" if backward else "forward"
    claim = f"prefix of 10 beside {tokens} tokens, {batch} images, {heads} heads of {width}: {what}" + lse * ", again"
    peer = "two attentions and two log-sum-exps" if lse else "schedule of the published code: the matrix, divided"
    # Scores and weighted sums of all tokens and prefixes; backward two products for each of them.
    products = 4 * batch * heads * tokens * (tokens + 10) * width * (3 if backward else 1)
    return compare(
        claim,
        lambda: run(prefix_attention),
        lambda: run(peer_form),
        peer_name=peer,
        target=target,
        floor=flops_floor(products),
    )


def learner(net: nn.Module, tasks: int = 2) -> LAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject(net, KVLoRA, r"blocks\.\d+\.attn\.qkv", name="online")
        method = LAE(net, alpha=0.99)
        for t in range(tasks):
            method.begin_task(2)
            if t:
                method.step(torch.rand(8, 1, 28, 28), torch.tensor([2, 3] * 4))
    return method


def experts(images: int) -> Row:
    method = learner(pretrained_vit())
    x = torch.rand(images, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def apart() -> Tensor:
        found = []
        for name in ("online", "offline"):
            activate(method.model, name)
            found.append(method.head(method.features(x)))
        activate(method.model, "online")
        return torch.stack(found)

    torch.testing.assert_close(method.experts(x), apart(), rtol=1e-4, atol=1e-4)  # products of another batch size
    claim = f"both experts on {images} images"
    least = flops_floor(counted_flops(apart))
    return compare(claim, lambda: method.experts(x), apart, peer_name="one forward for each expert", floor=least)


def accumulation(layers: int) -> Row:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        on = nn.ModuleList([nn.Linear(64, 5) for _ in range(layers)])
    off = copy.deepcopy(on).requires_grad_(False)
    twin = copy.deepcopy(on).requires_grad_(False)
    slow = list(off.parameters())
    fast = [p.detach() for p in on.parameters()]
    for p in fast:
        p.add_(1.0)
    ema_(slow, fast, 0.99)
    published_ema(twin, on, 0.99)
    for p, q in zip(slow, twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    claim = f"100 averages of {2 * layers} tensors"
    return compare(
        claim,
        lambda: [ema_(slow, fast, 0.99) for _ in range(100)],
        lambda: [published_ema(twin, on, 0.99) for _ in range(100)],
        peer_name="tensor by tensor",
        target=2.0 if layers >= 12 else None,
    )


def frozen_phase(epochs: int) -> Row:
    g = torch.Generator().manual_seed(0)
    data = Split(torch.rand(96, 1, 28, 28, generator=g), 2 + torch.arange(96) % 2)
    start = learner(pretrained_vit())

    def run(augment) -> Tensor:
        method = copy.deepcopy(start)
        options = {"epochs": epochs, "frozen_epochs": epochs, "generator": torch.Generator().manual_seed(0)}
        losses = method.learn(data, augment=augment, **options)
        return torch.cat([losses, *(p.flatten() for p in method.head.parameters())]).detach()

    # float32, features of another batch size, and Adam divides by the square root of small gradients
    torch.testing.assert_close(run(None), run(lambda x: x), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        once = flops_floor(counted_flops(lambda: start.features(data.x)))  # each image through the network
    return compare(
        f"{epochs} frozen epochs of 96 images",
        lambda: run(None),
        lambda: run(lambda x: x),
        peer_name="features anew for every batch",
        target=2.0 if epochs >= 3 else None,
        floor=once,
    )


def lora(width: int) -> Row:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        qkv = nn.Linear(width, 3 * width)
        x = torch.rand(8, 50, width)
        net = nn.Sequential(copy.deepcopy(qkv))
        inject(net, KVLoRA, ["0"], r=5)
        a = net[0].adapters["default"]
        a.B_k.data.normal_(std=0.1), a.B_v.data.normal_(std=0.1)
    qkv.requires_grad_(False)
    weights = [a.A_k, a.B_k, a.A_v, a.B_v]

    def grads(out: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(out.sum(), weights)])

    def ours() -> Tensor:
        return grads(net(x))

    def peer() -> Tensor:
        return grads(published_kv_lora(x, qkv, *weights, a.s_k, a.s_v))

    torch.testing.assert_close(ours(), peer(), rtol=1e-3, atol=1e-3)  # float32 sums over 400 tokens
    claim = f"LoRA of rank 5 on keys and values, width {width}, 400 tokens: forward and backward"
    name = "schedule of the published code: the dense update"
    return compare(claim, ours, peer, peer_name=name, floor=flops_floor(2 * x.numel() * 3 * width))  # the frozen layer


def rows() -> list[Row]:
    return [
        prefix(4, 12, 197, 64, target=1.5),
        prefix(4, 12, 197, 64, backward=True),
        prefix(4, 12, 197, 64, lse=True),
        prefix(1, 4, 1025, 64, target=1.5),
        experts(4),
        experts(50),
        accumulation(4),
        accumulation(48),
        frozen_phase(3),
        frozen_phase(10),
        lora(768),
    ]
