r"""TIES: trim each difference, elect one sign per entry, average those that agree.

Yadav, Tam, Choshen, Raffel, Bansal, "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv 2306.01708.

With :math:`\tau_t=\theta_t-\theta_0`, one entry at a time:

.. math:: \hat\tau_t=\tau_t\,[\,|\tau_t|\ge\text{its model's } k\text{-th largest magnitude}\,],\qquad
          \gamma=\mathrm{sgn}\sum_t\hat\tau_t,\qquad
          \theta=\theta_0+\lambda\,\frac{\sum_{t\in A}c_t\hat\tau_t}{\sum_{t\in A}c_t},\quad
          A=\{t:\ \mathrm{sgn}\,\hat\tau_t=\gamma\ne0\}.

The paper trims over the whole model, mergekit over each tensor. Here the scope is the tensor, or the model with the
thresholds that :func:`trim_thresholds` finds by reading the weights twice, in the memory of a few tensors.

Differs from the official code: equal magnitudes at the threshold are all kept (so the result does not depend on the
order of the entries), and :math:`k=\mathrm{round}(\text{density}\cdot n)` of n, at least 1 (official: one entry more,
``keep="kth"``). Where the sum of an entry is exactly 0, the sign that most entries of the tensor elected decides
(official: of the model; mergekit, PEFT: plus), which matters for ``elect="count"`` alone.

>>> import torch
>>> from peftref.merging.core.loop import merge
>>> base = {"w": torch.zeros(4)}
>>> models = [{"w": torch.tensor([4.0, 0.1, 3.0, -2.0])}, {"w": torch.tensor([2.0, 0.2, -1.0, 0.3])}]
>>> merge(base, models, ties(density=0.5))  # trimmed: [4, 0, 3, 0] and [2, 0, -1, 0]; at the third, + is elected
{'w': tensor([3., 0., 3., 0.])}
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..._checks import number, numbers_of, scalar
from ..core.aligned import check_names
from ..core.loop import Rule, State, check_aligned, difference, widest

__all__ = ["ties", "trim_thresholds"]

BITS = 15  # of a float32 magnitude that one reading settles: 31 bits in two readings


def ties(
    density: float = 0.2,
    scale: float = 1.0,
    *,
    weights: Sequence[float] | None = None,
    elect: str = "mass",
    combine: str = "mean",
    keep: str = "exact",
    thresholds: Sequence[float] | None = None,
) -> Rule:
    """The rule for :func:`peftref.merging.core.loop.merge`.

    Args:
        density: share of entries of each difference that survive the trim, in (0, 1] (0.2: paper).
        scale: lambda (1: paper, with the mean; tune it).
        weights: of the models in the combination (1 each); not in the election, as in the paper.
        elect: ``"mass"``, sign of the sum (paper); ``"count"``, of the number of signs; ``"weighted"``, of the
            weighted sum (mergekit).
        combine: ``"mean"`` (paper), ``"sum"``, or ``"max"``, over the models that agree with the elected sign.
        keep: ``"exact"`` or ``"kth"``, see above.
        thresholds: smallest magnitude to keep, one for each model, from :func:`trim_thresholds`; none: each tensor's.

    Raises:
        ValueError: a setting out of its range; at the merge, another number of models.
    """
    density = _check_trim(density, keep)
    for name, value, options in (
        ("elect", elect, ("mass", "count", "weighted")),
        ("combine", combine, ("mean", "sum", "max")),
    ):
        if value not in options:
            raise ValueError(f"{name}: expected one of {options}, got {value!r}")
    scale = number("scale", scale)
    weights = None if weights is None else numbers_of("weights", weights)
    thresholds = None if thresholds is None else _magnitudes(thresholds)

    def rule(name: str, w0: Tensor, ws: Sequence[Tensor]) -> Tensor:
        for what, values in (("weights", weights), ("thresholds", thresholds)):
            if values is not None and len(values) != len(ws):
                raise ValueError(f"{what}: expected one for each of the {len(ws)} models, got {len(values)}")
        if not w0.numel() or scale == 0:
            return w0
        tau = torch.stack([difference(w, w0) for w in ws]).reshape(len(ws), -1)  # (N, n)
        size = _sizes(tau)
        if thresholds is None:
            least = size.kthvalue(tau.shape[1] - kept(tau.shape[1], density, keep) + 1, dim=1, keepdim=True).values
        else:
            least = size.new_tensor(list(thresholds))[:, None]
        tau = tau.masked_fill_(size < least, 0.0)
        c = tau.new_tensor([1.0] * len(ws) if weights is None else list(weights))[:, None]
        votes = {"mass": tau, "count": tau.sign(), "weighted": c * tau}[elect].sum(0)
        sign = votes.sign()
        sign = torch.where(sign == 0, sign.sum().sign(), sign)
        agree = (tau.sign() == sign) & (tau != 0)
        if combine == "max":
            y = sign * (tau.abs() * agree).amax(0)
        else:
            y = torch.where(agree & (c != 0), c * tau, 0.0).sum(0)
            total = (c * agree).sum(0)
            y = torch.where(total == 0, 0.0, y / total) if combine == "mean" else y
        y = torch.where(tau.sum(0).isnan(), math.nan, y)  # no number, or infinities of both signs
        return w0 + scale * y.view_as(w0)

    return rule


def kept(n: int, density: float, keep: str = "exact") -> int:
    """How many of n entries survive the trim."""
    if keep == "kth":
        return min(math.floor(density * n) + 1, n)
    return min(max(round(density * n), 1), n)


@torch.no_grad()
def trim_thresholds(
    base: State, models: Sequence[State], density: float = 0.2, *, keep: str = "exact", skip: Collection[str] = ()
) -> list[float]:
    """For each model the smallest magnitude that survives a trim over all tensors together (the paper's scope).

    Exact, by two readings: the bits of a non-negative float32, read as an integer, are in the order of its value. The
    first reading counts the upper half of the bits and so finds the upper half of the wanted number, the second reading
    counts the lower half of those that share it.

    Raises:
        ValueError: names or shapes that do not match, or a setting out of its range.
    """
    density = _check_trim(density, keep)
    skip = set(check_names(skip, "skip"))
    layout = check_aligned(base, models, skip)
    names = [n for n, t in layout.items() if n not in skip and t.is_floating_point()]
    total = sum(layout[n].numel() for n in names)
    if not total:
        return [0.0] * len(models)
    rank = torch.full((len(models), 1), kept(total, density, keep))
    found = torch.zeros(len(models), dtype=torch.long)
    for shift, width in ((BITS, 31 - BITS), (0, BITS)):
        counts = torch.zeros(len(models), 2**width, dtype=torch.long)
        for name in names:
            w0 = base[name].detach()
            ws = [model[name].detach() for model in models]
            w0, *ws = (w.to(w0.device, widest([w0, *ws])) for w in (w0, *ws))
            for i, w in enumerate(ws):
                bits = _sizes(difference(w, w0)).flatten().view(torch.int32)
                if shift == 0:
                    bits = bits[bits >> BITS == found[i]] & (2**BITS - 1)
                counts[i] += torch.bincount(bits >> shift, minlength=2**width).cpu()
        largest_first = counts.flip(1).cumsum(1)
        place = (largest_first < rank).sum(1)  # the first bin, from the top, in which the count reaches the rank
        above = largest_first.gather(1, (place - 1).clamp_min(0)[:, None]) * (place > 0)[:, None]
        rank = rank - above
        found = (found << width) + (2**width - 1 - place) if shift == 0 else 2**width - 1 - place
    return found.to(torch.int32).view(torch.float32).tolist()


def _magnitudes(thresholds: Iterable[Any]) -> list[float]:
    """Smallest magnitudes to keep: at least 0, and infinite where the weights are."""
    listed = isinstance(thresholds, Iterable) and not isinstance(thresholds, str)
    found: list[Any] = [scalar(least) for least in thresholds] if listed else [None]
    real = [isinstance(least, Real) and not isinstance(least, bool) for least in found]
    if not all(real) or not all(least >= 0 for least in found):
        raise ValueError(f"thresholds: expected magnitudes >= 0, one for each model, got {thresholds!r}")
    return [float(least) for least in found]


def _sizes(tau: Tensor) -> Tensor:
    """Magnitudes to rank; what is no number is the largest, so that it stays and shows."""
    return tau.abs().float().nan_to_num(nan=math.inf, posinf=math.inf)


def _check_trim(density: float, keep: str) -> float:
    density = number("density", density)
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a share in (0, 1], got {density}")
    if keep not in ("exact", "kth"):
        raise ValueError(f"keep: expected one of ('exact', 'kth'), got {keep!r}")
    return density
