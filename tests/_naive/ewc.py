"""Naive twins of EWC: one sample, one class and one weight at a time; and the batch gradient that many codes square."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def loop_fisher(model: nn.Module, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    """The specification: a backward pass per sample (and class); ``model`` must be in eval mode."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    for i in range(len(x)):
        log_p = model(x[i : i + 1])[0].log_softmax(-1)
        classes = range(len(log_p)) if y is None else [int(y[i])]
        for k in classes:
            weight = log_p[k].exp().item() if y is None else 1.0
            gradients = torch.autograd.grad(log_p[k], [*named.values()], retain_graph=True)
            for total_of_one, g in zip(total.values(), gradients, strict=True):
                total_of_one += weight * g**2 / len(x)
    return total


def batch_fisher(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> dict[str, Tensor]:
    """The trap: squares of the gradient of a batch's mean loss, averaged over batches."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    parts = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    for xs, ys in parts:
        gradients = torch.autograd.grad(F.cross_entropy(model(xs), ys), [*named.values()])
        for total_of_one, g in zip(total.values(), gradients, strict=True):
            total_of_one += g**2 / len(parts)
    return total


def loop_penalty(theta: dict[str, Tensor], anchor: dict[str, Tensor], fisher: dict[str, Tensor]) -> float:
    total = 0.0
    for name, f in fisher.items():
        for a, b, c in zip(theta[name].flatten(), anchor[name].flatten(), f.flatten(), strict=True):
            total += 0.5 * c.item() * (a.item() - b.item()) ** 2
    return total
