"""What EVA finds in a language model: explained variance, dealt ranks, and the share of a gradient that it captures.

>>> model = StandIn()
>>> blocks = torch.arange(48).view(4, 12) % 20
>>> found = study(model, blocks[:2], blocks[2:], r=2, rhos=[1.0, 2.0])
>>> sum(found["ranks"]["2.0"]) == 2 * len(found["names"])
True
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.vit import Block
from ..eva import collect, redistribute
from ._sentences import linears

__all__ = ["StandIn", "captured", "gradients", "study"]


class StandIn(nn.Module):
    """A random language model of two blocks, with the interface of ``transformers``."""

    def __init__(self, words: int = 20, width: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(words, width)
            self.layers = nn.ModuleList(Block(width, 2) for _ in range(2))
            self.head = nn.Linear(width, words)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def study(
    model: nn.Module, blocks: Tensor, held_out: Tensor, *, r: int, rhos: Sequence[float], batch: int = 4
) -> dict[str, Any]:
    """Directions from some blocks of tokens, held against the gradient on others.

    Args:
        model: returns an object with ``loss`` when called with ``input_ids`` and ``labels``.
        blocks: ``(N, tokens)``, for the directions; without labels or gradients.
        held_out: ``(M, tokens)``, for the gradient.
        r: ranks a layer has on average.
        rhos: values of EVA's rho, to deal ranks by.
        batch: blocks that pass at once.
    """
    names = linears(model)
    batches = [{"input_ids": part} for part in blocks.split(batch)]
    options: dict[str, Any] = {
        "r": r,
        "rho": max(rhos),
        "route": "lowrank",
        "tau": 1.0,
    }  # PEFT's way; all batches count
    first = collect(model, names, batches, **options).spectra
    plain = collect(model, names, batches, center=False, **options).spectra
    grads = gradients(model, names, held_out.split(batch))
    shares = {n: captured(first[n].components, grads[n]) for n in names}  # of each direction
    ranks = {rho: redistribute({n: first[n].ratio[: round(rho * r)] for n in names}, r * len(names)) for rho in rhos}
    inputs = list({id(spectrum): spectrum for spectrum in first.values()}.values())  # layers share some
    weights = {n: model.get_parameter(f"{n}.weight") for n in names}
    sides = {n: sum(weight.shape) for n, weight in weights.items()}
    size = {n: float(grads[n].square().sum()) for n in names}
    return {
        "names": names,
        "input": [next(j for j, s in enumerate(inputs) if s is first[n]) for n in names],
        "ratio": [[float(f"{xi:.3g}") for xi in spectrum.ratio.tolist()] for spectrum in inputs],
        "explained": [float(first[n].ratio[:r].sum()) for n in names],
        "captured": {
            "EVA": [float(shares[n][:r].sum()) for n in names],
            "EVA, not centred": [float(captured(plain[n].components[:r], grads[n]).sum()) for n in names],
            "random": [r / weights[n].shape[1] for n in names],
            "gradient's own": [_largest(grads[n], r) for n in names],
            "mean alone": [float(captured(F.normalize(first[n].mean[None]), grads[n]).sum()) for n in names],
        },
        "size": [size[n] for n in names],
        "ranks": {str(rho): [dealt[n] for n in names] for rho, dealt in ranks.items()},
        "parameters": {str(rho): sum(sides[n] * q for n, q in dealt.items()) for rho, dealt in ranks.items()},
        "kept": {
            str(rho): sum(size[n] * float(shares[n][:q].sum()) for n, q in dealt.items()) / sum(size.values())
            for rho, dealt in ranks.items()
        },
    }


def captured(directions: Tensor, gradient: Tensor) -> Tensor:
    """Share of the squared gradient of a weight, ``(o, i)``, along each of ``(k, i)`` orthonormal directions."""
    # eq-eva-gradient:  the gradient of B is that of W times A^T; its share is ||G A^T||_F^2 / ||G||_F^2
    return (gradient @ directions.T).square().sum(0) / gradient.square().sum()


def gradients(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss with respect to full weights; the model is left as it was.

    Args:
        model: see :func:`study`.
        names: of the layers.
        batches: blocks of tokens.
    """
    weights = {n: model.get_parameter(f"{n}.weight") for n in names}
    flags = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    total = [torch.zeros_like(weight) for weight in weights.values()]
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        for one, gradient in zip(total, torch.autograd.grad(loss, list(weights.values())), strict=True):
            one.add_(gradient, alpha=len(batch))
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return dict(zip(names, total, strict=True))


def _largest(gradient: Tensor, r: int) -> float:
    """Share of the squared gradient that ``r`` directions capture at most: its own leading singular vectors."""
    thin = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    squares = torch.linalg.eigvalsh(thin.double() @ thin.double().T)
    return float(squares[-r:].sum() / squares.sum())
