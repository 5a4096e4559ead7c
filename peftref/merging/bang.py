r"""BANG (balanced averaging): fine-tune so that neither model drowns the other, then average; and measure who is right.

Lin, Tan, Hao, Wong, Dong, Zhang, Yang, Zhang, "Spurious Feature Diversification Improves Out-of-distribution
Generalization", ICLR 2024, arXiv 2309.17230.

WiSE-FT averages the weights of a model and of its fine-tuned version, ``merge(theta0, [theta1], wise_ft(0.5))``. That
works best when neither drowns the other (eq-bang-gain, :mod:`peftref.merging.experiments.spurious`), but fine-tuning
tends to make the second the louder. Rescaling its head is little help, for weights are averaged, and rescaling all of
its layers only changes the mixing coefficient. BANG keeps it modest by its targets: label smoothing (eq-bang-smooth),
Mixup (eq-bang-mixup), or both,

.. math:: \tilde y=(1-\epsilon)\,y+\frac\epsilon K,\qquad
          (\tilde x,\tilde y)=\nu\,(x_i,y_i)+(1-\nu)\,(x_j,y_j),\quad\nu\sim\mathrm{Beta}(a,a),

with the cross-entropy :math:`-\sum_k\tilde y_k\log p_k`, whose gradient in the logits is :math:`p-\tilde y`. Both are
affine in y, so their order does not matter.

=================  =====================  =================  ===================
argument           here                   paper              shape
=================  =====================  =================  ===================
``targets``        :math:`y`              same               ``(..., K)``
``smoothing``      :math:`\epsilon`       not confirmed      scalar
``mixing``         :math:`a`              not confirmed      scalar
``nu``             :math:`\nu`            not confirmed      scalar
=================  =====================  =================  ===================

The paper gives no code for this part. Ours: one :math:`\nu` per batch (as timm and torchvision do by default), partners
by a random permutation (timm: the reversed batch, torchvision: the batch rolled by one); strengths are the reader's to
tune, 0.1 and 0.5 to begin with.

Two wrong models with a right average are the paper's FalseFalseTrue: :func:`outcomes` counts all eight cases.

The chapter derives the rest: the logits of picked features (eq-bang-features) and the moments of their margins
(eq-bang-moments), the finite gap at which smoothed targets are met (eq-bang-gap), the average (eq-bang-wiseft), and
what loudness makes of its coefficient (eq-bang-loudness).

>>> smooth(torch.tensor([0.0, 1.0]), 0.1)
tensor([0.0500, 0.9500])
>>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))  # log 2
tensor(0.6931)
>>> y = torch.tensor([0, 1, 2, 2])
>>> table = outcomes(y, torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 2, 2]))
>>> table[table["count"] > 0]  # doctest: +NORMALIZE_WHITESPACE
         first  second  average  count  fraction
outcome
FFT      False   False     True      1      0.25
FTF      False    True    False      1      0.25
TFT       True   False     True      1      0.25
TTT       True    True     True      1      0.25
"""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, number

__all__ = [
    "bang_loss",
    "calibration_error",
    "confidence",
    "fine_tune",
    "mixup",
    "outcomes",
    "smooth",
    "soft_cross_entropy",
]

OUTCOMES = ["".join("FT"[right] for right in cell) for cell in product((0, 1), repeat=3)]  # FFF, FFT, ..., TTT


def smooth(targets: Tensor, smoothing: float = 0.1) -> Tensor:
    """Label smoothing (eq-bang-smooth) of targets: y~ = (1 - eps) y + eps / K.

    Args:
        targets: ``(..., K)``, one-hot or soft.
        smoothing: eps, in [0, 1).

    Raises:
        ValueError: ``smoothing`` outside [0, 1), or fewer than two classes.
    """
    _check(smoothing=smoothing)
    targets = _targets(targets)
    # eq-bang-smooth:  y~ = (1 - eps) y + eps / K
    return (1 - smoothing) * targets + smoothing / targets.shape[-1]


def mixup(
    x: Tensor, targets: Tensor, mixing: float = 0.5, *, generator: torch.Generator, nu: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mix each sample with a random partner (eq-bang-mixup): x~ = nu x_i + (1 - nu) x_j, and the targets alike.

    One :math:`\nu` for the batch, the same for x and y.

    Args:
        x: inputs ``(N, ...)``.
        targets: ``(N, K)``, one-hot or soft.
        mixing: a of Beta(a, a), > 0: towards 0 hardly anything is mixed, 1 is uniform.
        generator: of :math:`\nu` and the partners.
        nu: this one instead of a random one.

    Raises:
        TypeError: inputs or targets that are not floating-point.
        ValueError: ``mixing`` not positive, ``nu`` outside [0, 1], or unequal numbers of inputs and targets.
    """
    _check(mixing=mixing)
    targets = _targets(targets)
    if targets.shape[:-1] != x.shape[:1]:
        raise ValueError(f"targets: expected shape ({len(x)}, K), for the inputs, got {tuple(targets.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating-point inputs, got {x.dtype}")
    if nu is not None:
        number("nu", nu, 0, 1)
    drawn, partner = _draw(len(x), mixing, generator)
    nu = drawn if nu is None else nu
    return _mix(x, nu, partner), _mix(targets, nu, partner)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against soft targets: the mean over all rows of -sum over k of y~_k log p_k.

    Args:
        logits: ``(..., K)``.
        targets: distributions of the same shape.

    Raises:
        ValueError: shapes that differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"targets: expected shape {tuple(logits.shape)}, as logits, got {tuple(targets.shape)}")
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def bang_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    smoothing: float = 0.1,
    mixing: float | None = 0.5,
    *,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one batch: cross-entropy of the model on mixed inputs against mixed, smoothed targets.

    Args:
        model: a classifier.
        x: inputs ``(N, ...)``.
        y: classes ``(N,)``.
        smoothing: of the labels, in [0, 1); 0 for none.
        mixing: a of Mixup's Beta(a, a); ``None`` for none. With neither this is the usual cross-entropy.
        generator: of Mixup's draws; not used without mixing.
    """
    _check(smoothing=smoothing, mixing=mixing)
    if y.shape != x.shape[:1] or y.is_floating_point() or (y < 0).any():
        raise ValueError(f"y: expected classes >= 0 of shape ({len(x)},), got {y.dtype} of shape {tuple(y.shape)}")
    nu, partner = (1.0, torch.arange(len(x))) if mixing is None else _draw(len(x), mixing, generator)
    logits = model(x if mixing is None else _mix(x, nu, partner))
    if not len(y) or y.max() >= logits.shape[-1]:
        raise ValueError(f"y: expected classes below {logits.shape[-1]}, as the model has, got {y.unique().tolist()}")
    targets = F.one_hot(y, logits.shape[-1]).to(logits.dtype)
    return soft_cross_entropy(logits, smooth(_mix(targets, nu, partner), smoothing))


def fine_tune(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    smoothing: float = 0.1,
    mixing: float | None = 0.5,
    *,
    epochs: int = 5,
    lr: float = 1e-3,
    batch_size: int = 100,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A copy of ``model`` trained end to end by :func:`bang_loss`; average it with ``model`` by ``wise_ft``.

    AdamW with a learning rate that falls to 0 along a cosine. Whatever the smoothing and mixing, the same seed gives
    the same batches.

    Args:
        model: the starting point, head included; never changed.
        x: inputs ``(N, ...)``.
        y: classes ``(N,)``.
        smoothing: of the labels; 0 for none.
        mixing: a of Mixup's Beta(a, a); ``None`` for none.
        epochs: passes over the data.
        lr: learning rate at the start.
        batch_size: samples in a batch.
        weight_decay: of AdamW.
        seed: of the order of the samples, and of Mixup.

    Returns:
        The copy, in eval mode.
    """
    _check(smoothing=smoothing, mixing=mixing)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x, y: expected equal, positive numbers of inputs and classes, got {len(x)} and {len(y)}")
    integer("epochs", epochs, 1)
    integer("batch_size", batch_size, 1)
    order = torch.Generator().manual_seed(seed)
    mixer = torch.Generator().manual_seed(seed + 1)
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=weight_decay)
    sizes = [batch_size] * (len(x) // batch_size) + [r for r in (len(x) % batch_size,) if r]
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]  # BatchNorm cannot learn from a batch of one: it joins the batch before
    steps = epochs * len(sizes)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=order).to(x.device).split(sizes):
            bang_loss(tuned, x[i], y[i], smoothing, mixing, generator=mixer).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return tuned.eval()


def outcomes(y: Tensor, first: Tensor, second: Tensor, average: Tensor) -> pd.DataFrame:
    """Who is right: the eight cases FFF, FFT, ..., TTT of two models and their average, with counts and fractions.

    Args:
        y: classes ``(N,)``.
        first: classes ``(N,)`` that one model predicts.
        second: those of the other model.
        average: those of the average.

    Returns:
        A row for each case, e.g. ``table.loc["FFT", "fraction"]``. The columns ``first``, ``second``, ``average`` say
        who is right, so ``table.fraction[table.average].sum()`` is an accuracy.

    Raises:
        ValueError: no samples, or shapes that differ.
    """
    predicted = {"first": first, "second": second, "average": average}
    for name, t in predicted.items():
        if t.shape != y.shape or y.ndim != 1 or not len(y):
            raise ValueError(f"y, {name}: expected one shape (N,), N >= 1, got {tuple(y.shape)} and {tuple(t.shape)}")
    a, b, c = ((t == y).long() for t in predicted.values())
    count = (4 * a + 2 * b + c).bincount(minlength=8).cpu().numpy()
    table = pd.DataFrame(list(product((False, True), repeat=3)), columns=list(predicted))
    table = table.assign(count=count, fraction=count / len(y))
    return table.set_index(pd.Index(OUTCOMES, name="outcome"))


def confidence(probs: Tensor) -> float:
    """Mean of the largest probability of each row of ``(N, K)``."""
    return _distributions(probs).amax(-1).double().mean().item()


def calibration_error(probs: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean over bins of equal width of the gap between accuracy and confidence.

    Args:
        probs: ``(N, K)``.
        y: classes ``(N,)``.
        bins: of which each holds its upper limit (15: Guo et al., ICML 2017); they count by their samples.

    Raises:
        ValueError: rows that are no distributions (logits?), other shapes, or no bins.
    """
    top, predicted = _distributions(probs).double().max(-1)
    if y.shape != top.shape:
        raise ValueError(f"y: expected shape {tuple(top.shape)}, got {tuple(y.shape)}")
    integer("bins", bins, 1)
    place = torch.bucketize(top, torch.linspace(0, 1, bins + 1, dtype=top.dtype, device=top.device)[1:-1])
    # sum_b n_b/N |acc_b - conf_b| = sum_b |sum of (right - confidence) in b| / N
    gaps = top.new_zeros(bins).index_add(0, place, (predicted == y).to(top) - top)
    return (gaps.abs().sum() / len(top)).item()


def _draw(n: int, mixing: float, generator: torch.Generator) -> tuple[float, Tensor]:
    """nu of Beta(a, a), for which torch has no law that takes a generator, and the partners."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    partner = torch.randperm(n, generator=generator, device=generator.device)
    return np.random.default_rng(seed).beta(mixing, mixing), partner


def _mix(t: Tensor, nu: float, partner: Tensor) -> Tensor:
    # eq-bang-mixup:  nu t_i + (1 - nu) t_j, to the bit t_i where i is its own partner
    return torch.lerp(t[partner.to(t.device)], t, nu)


def _targets(targets: Tensor) -> Tensor:
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        got = getattr(targets, "dtype", type(targets).__name__)
        raise TypeError(f"targets: expected floating-point probabilities, got {got}")
    if targets.ndim < 1 or targets.shape[-1] < 2:
        raise ValueError(f"targets: expected shape (..., K), K >= 2, got {tuple(targets.shape)}")
    return targets


def _distributions(probs: Tensor) -> Tensor:
    if probs.ndim != 2 or not len(probs) or probs.shape[1] < 2:
        raise ValueError(f"probs: expected shape (N, K), N >= 1, K >= 2, got {tuple(probs.shape)}")
    if not ((probs >= 0).all() and ((probs.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError("probs: expected rows that sum to 1; take the softmax of logits")
    return probs


def _check(smoothing: float = 0.0, mixing: float | None = None) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a number in [0, 1), got {smoothing}")
    if mixing is not None and not 0 < mixing < float("inf"):
        raise ValueError(f"mixing: expected a positive number, got {mixing}")
