r"""Rules for :func:`peftref.merging.core.loop.merge` that add and interpolate weights: the baselines of this part.

With base :math:`\theta_0`, models :math:`\theta_t` and differences (task vectors) :math:`\tau_t=\theta_t-\theta_0`:

=======================  ==========================================================  ==================================
rule                     merged weights                                              source
=======================  ==========================================================  ==================================
:func:`average`          :math:`\frac1N\sum_t\theta_t`                               Wortsman et al., ICML 2022 (soups)
:func:`linear`           :math:`\sum_tc_t\theta_t`                                   any weights
:func:`task_arithmetic`  :math:`\theta_0+\sum_t\lambda_t\tau_t`                      Ilharco et al., ICLR 2023
:func:`wise_ft`          :math:`(1-\alpha)\theta_0+\alpha\theta_1`                   Wortsman et al., CVPR 2022
:func:`fisher_wise_ft`   the same, entries weighted by :math:`F_0,F_1`               WiSE-FT's official code
:func:`dare`             :math:`\tau_t\leftarrow m_t\odot\tau_t/(1-p)`, then a rule  Yu et al., ICML 2024
=======================  ==========================================================  ==================================

A coefficient of 0 leaves its tensor out, even one that is not finite; elsewhere an infinity or NaN goes where the
formula takes it, and where all agree on it, it stays.

>>> import torch
>>> from peftref.merging.core.loop import merge
>>> zero_shot, tuned = {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([2.0, 5.0])}
>>> merge(zero_shot, [tuned], wise_ft(0.25))
{'w': tensor([0.5000, 2.0000])}
>>> merge(zero_shot, [tuned, tuned], task_arithmetic(0.25))
{'w': tensor([1., 3.])}
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._checks import number, numbers_of, scalar
from ..core.aligned import check_states
from ..core.loop import Rule, State, difference, elementwise
from ..core.storing import all_finite

__all__ = ["average", "dare", "fisher_wise_ft", "linear", "task_arithmetic", "wise_ft"]


def average() -> Rule:
    """The uniform mean of the models; the base only gives the layout."""

    @elementwise
    def rule(name: str, w0: Tensor, ws: Sequence[Tensor]) -> Tensor:
        y = ws[0].clone()
        for n, w in enumerate(ws[1:], start=2):
            y.lerp_(w, 1 / n)  # a running mean: equal models come out bit for bit
        return _mended(y, lambda: torch.stack(list(ws)).mean(0))

    return rule


def linear(weights: Sequence[float]) -> Rule:
    """A weighted sum of the models: theta = sum over t of c_t theta_t.

    The weights need not sum to 1, and the base only gives the layout.

    Args:
        weights: c, one for each model.

    Raises:
        ValueError: weights that are not finite; at the merge, another number of models.
    """
    weights = _some("weights", weights)

    @elementwise
    def rule(name: str, w0: Tensor, ws: Sequence[Tensor]) -> Tensor:
        _check_count("weights", weights, ws)
        y = ws[0] * weights[0] if weights[0] else torch.zeros_like(w0)
        for w, c in zip(ws[1:], weights[1:], strict=True):
            if c:
                y.add_(w, alpha=c)
        return y

    return rule


def task_arithmetic(scale: float | Sequence[float] = 0.3) -> Rule:
    """The base plus the scaled sum of the differences: theta = theta_0 + sum over t of lambda_t (theta_t - theta_0).

    A negative scale makes the model forget a task.

    Args:
        scale: one for all models (0.3: the value that fusion_bench takes; tune it on validation data) or one for each.
    """
    several = isinstance(scale, Iterable) and getattr(scale, "ndim", 1) > 0
    given = _some("scale", scale if several else [scale])

    @elementwise
    def rule(name: str, w0: Tensor, ws: Sequence[Tensor]) -> Tensor:
        scales = given * len(ws) if len(given) == 1 else given
        _check_count("scale", scales, ws)
        used = [(w, c) for w, c in zip(ws, scales, strict=True) if c]
        if not used:
            return w0.clone()
        y = torch.lerp(w0, used[0][0], used[0][1])  # w0 + scale (w - w0)
        for w, c in used[1:]:
            y.add_(w - w0, alpha=c)
        return _mended(y, lambda: sum((c * difference(w, w0) for w, c in used), start=w0))

    return rule


def wise_ft(alpha: float = 0.5) -> Rule:
    """Interpolation from the base (0, bit for bit) to the one model (1): theta = (1 - alpha) theta_0 + alpha theta_1.

    Args:
        alpha: 0.5 is the paper's value when nothing is tuned. Outside [0, 1] it extrapolates, with a warning.
    """
    alpha = number("alpha", alpha)
    if not 0 <= alpha <= 1:
        warnings.warn(f"alpha: {alpha} is outside [0, 1], so the weights are extrapolated", stacklevel=2)

    @elementwise
    def rule(name: str, w0: Tensor, ws: Sequence[Tensor]) -> Tensor:
        (w1,) = _exactly_one(ws)
        if alpha in (0, 1):
            return (w1 if alpha else w0).clone()  # the other may be anything
        y = torch.lerp(w0, w1, alpha)  # theta_0 + alpha (theta_1 - theta_0), exact at both ends
        return _mended(y, lambda: (1 - alpha) * w0 + alpha * w1)

    return rule


def fisher_wise_ft(alpha: float, fisher0: State, fisher1: State, floor: float = 1e-6) -> Rule:
    r"""Interpolation weighted, entry by entry, by the diagonal Fisher information of the two models:

    .. math:: \theta=\frac{(1-\alpha)F_0\,\theta_0+\alpha F_1\,\theta_1}{(1-\alpha)F_0+\alpha F_1} .

    Args:
        alpha: in [0, 1].
        fisher0: the information of the base, under the names of its tensors.
        fisher1: that of the model.
        floor: smallest information (1e-6 here; it keeps entries that neither model needs at the plain interpolation).

    Raises:
        ValueError: ``alpha`` outside [0, 1], ``floor`` not positive; at the merge, a name or shape without information.
    """
    alpha = number("alpha", alpha, 0, 1)
    floor = number("floor", floor, 0, open_low=True)
    check_states(fisher0=fisher0, fisher1=fisher1)

    def rule(name: str, w0: Tensor, ws: Sequence[Tensor]) -> Tensor:
        (w1,) = _exactly_one(ws)
        f0 = _information("fisher0", fisher0, name, w0).clamp_min(floor)
        f1 = _information("fisher1", fisher1, name, w0).clamp_min(floor)
        share = alpha * f1 / ((1 - alpha) * f0 + alpha * f1)
        y = _mended(torch.lerp(w0, w1, share), lambda: (1 - share) * w0 + share * w1)
        return torch.where(share == 0, w0, torch.where(share == 1, w1, y))

    return rule


def dare(drop: float, then: Rule, seed: int = 0) -> Rule:
    """Drop entries of each difference at random, enlarge the others to keep the mean, then merge by another rule.

    Args:
        drop: probability p of dropping, in [0, 1); the others are divided by 1 - p.
        then: the rule for what remains, such as ``task_arithmetic(1.0)`` or ``ties(density=1.0)``.
        seed: each tensor of each model draws from its own generator, made of the seed, its name and the model's place,
            so the masks do not depend on the order in which tensors are read.
    """
    drop = number("drop", drop)
    if not 0 <= drop < 1:
        raise ValueError(f"drop: expected a probability in [0, 1), got {drop}")
    if not callable(then):
        raise TypeError(f"then: expected a rule, got {type(then).__name__}")
    seed = scalar(seed)

    def rule(name: str, w0: Tensor, ws: Sequence[Tensor]) -> Tensor:
        def thinned(i: int, w: Tensor) -> Tensor:
            generator = torch.Generator(w.device).manual_seed(zlib.crc32(f"{seed}/{i}/{name}".encode()))
            keep = torch.empty_like(w).uniform_(generator=generator) >= drop
            return torch.where(keep, w0 + difference(w, w0) / (1 - drop), w0)

        return then(name, w0, [thinned(i, w) for i, w in enumerate(ws)])

    return rule


def _mended(y: Tensor, formula: Callable[[], Tensor]) -> Tensor:
    """``y``, with the definition itself where the shorter way to it met infinities: half of -inf and -inf is -inf."""
    return y if not y.numel() or all_finite(y) else torch.where(y.isnan(), formula(), y)


def _some(name: str, values: Any) -> tuple[float, ...]:
    found = numbers_of(name, values)
    if not found:
        raise ValueError(f"{name}: expected finite numbers, got none")
    return found


def _check_count(name: str, values: Sequence[float], ws: Sequence[Tensor]) -> None:
    if len(values) != len(ws):
        raise ValueError(f"{name}: expected one for each of the {len(ws)} models, got {len(values)}")


def _exactly_one(ws: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(ws) != 1:
        raise ValueError(f"models: expected one to interpolate with the base, got {len(ws)}")
    return ws


def _information(label: str, fisher: State, name: str, like: Tensor) -> Tensor:
    f = fisher.get(name)
    if f is None or f.shape != like.shape:
        got = "none" if f is None else f"shape {tuple(f.shape)}"
        raise ValueError(f"{label}: expected a tensor of shape {tuple(like.shape)} for {name}, got {got}")
    f = f.to(like)
    least = f.amin().item() if f.numel() else 0.0
    if not least >= 0:  # NaN is not
        raise ValueError(f"{label}: expected information >= 0 for {name}, got {least:g}")
    return f
