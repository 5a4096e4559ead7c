r"""Why an average of two models beats both out of distribution: a model of features that can be counted.

Lin, Tan, Hao, Wong, Dong, Zhang, Yang, Zhang, "Spurious Feature Diversification Improves Out-of-distribution
Generalization", ICLR 2024, arXiv 2309.17230.

A feature points to one of K classes. An *invariant* one always points to the right class y; a *spurious* one keeps it
with probability 1 - p, and with probability p points to a class drawn uniformly from all K. A model has picked
:math:`n_v` invariant and :math:`n_s` spurious features; its logit of a class is the number of picked features that
point there. To the K - 1 margins :math:`M_k=\text{logit}_y-\text{logit}_k` one spurious feature adds either +1 to all,
with probability :math:`1-p+p/K`, or -1 to one, with probability :math:`p/K` each. So it adds :math:`1-p` in the mean,
with variance :math:`p(K+2-pK)/K`, and covariance :math:`p(K+1-pK)/K` of two margins. By the central limit theorem the
accuracy is the probability that normal margins with this covariance and the same mean x are all positive
(eq-bang-accuracy; u standard normal):

.. math:: F_p(x)=\mathbb E_u\,\Phi\!\Big(\tfrac{x+\sqrt{p(K+1-pK)/K}\,u}{\sqrt{p/K}}\Big)^{K-1},\qquad
          x_{\rm single}=\frac{(1-p)n_s+n_v}{\sqrt{n_s}},

the latter being eq-bang-single. A second model picks :math:`n_v',n_s'`, of which it shares :math:`n_{vo},n_{so}` with
the first, and is the more confident one by a factor :math:`\lambda=ab`: its head times a, its features times b. The sum
of the outputs, :math:`w^\top\phi+w'^\top\phi'`, counts its own features :math:`\lambda` times and shared ones
:math:`1+\lambda` times. The average of the weights, up to a factor :math:`(w+w')^\top(\phi+\phi')`, counts shared ones
:math:`s=(1+a)(1+b)` times. Hence (eq-bang-ose, eq-bang-wse)

.. math:: x_{\rm OSE}&=\frac{(1-p)(n_s+\lambda n_s')+n_v+\lambda n_v'}
                     {\sqrt{n_s+\lambda^2n_s'+2\lambda n_{so}}},\\
          x_{\rm WSE}&=\frac{(1-p)(n_s+\lambda n_s'+(a+b)n_{so})+n_v+\lambda n_v'+(a+b)n_{vo}}
                     {\sqrt{n_s+\lambda^2n_s'+(s^2-1-\lambda^2)n_{so}}} .

At a = b = 1 the factors of :math:`n_{so}` under the roots are 2 and 14: averaging weights suffers more from a shared
spurious feature, and gains more from a shared invariant one. Two equal models that share nothing gain (eq-bang-gain)

.. math:: \frac{x_{\rm OSE}}{x_{\rm single}}=\frac{1+\lambda}{\sqrt{1+\lambda^2}}\le\sqrt2 .

=========================  =======================  =====================================  ==========
argument                   here                     paper                                  shape
=========================  =======================  =====================================  ==========
``p``                      :math:`p`                :math:`p`                              any
``classes``                :math:`K`                :math:`K`                              any
``n_v``, ``n_s``           :math:`n_v,n_s`          :math:`\bar n_v,\bar n_s`              any
``n_v2``, ``n_s2``         :math:`n_v',n_s'`        :math:`\tilde n_v,\tilde n_s`          any
``n_vo``, ``n_so``         :math:`n_{vo},n_{so}`    :math:`n_{vo},n_{so}`                  any
``scale``                  :math:`\lambda`, a       :math:`\lambda`                        any
``feature_scale``          :math:`b`                :math:`\lambda`                        any
=========================  =======================  =====================================  ==========

Confirmed by the tests: :math:`F_p` by SciPy's normal distribution in K - 1 dimensions (K = 3, 4), by adaptive
quadrature (K to 1000) and by closed forms (K = 2; x = 0 with K = 3, 4; p = 1); the margins by models written out with
vectors, masks and heads as in the paper; :func:`simulate` by enumerating every outcome of a few features; all together
by :func:`simulate` with hundreds of features. With few features, whose counts are far from normal, the theory promises
too much: about 1 point at 20 features, p = 0.9 and 3 classes, but 3 to 8 points with 10 classes.

Differs from the paper: its integral has K - 1 dimensions; as all margins covary equally, one is enough. The scales a, b
and overlaps together are worked out here.

>>> p = torch.tensor([0.0, 0.5, 0.9])
>>> spurious_accuracy(margin_single(p, n_v=2, n_s=20), p, classes=3)  # alone
tensor([1.0000, 0.9996, 0.7769], dtype=torch.float64)
>>> spurious_accuracy(margin_ose(p, n_v=2, n_s=20), p, classes=3)  # with a second model of other features
tensor([1.0000, 1.0000, 0.8921], dtype=torch.float64)
>>> alike = {"n_v": 2, "n_s": 20, "n_so": 8}  # averaging weights suffers from what both rely on
>>> [spurious_accuracy(margin(0.9, **alike), 0.9, classes=10) for margin in (margin_ose, margin_wse)]
[tensor(0.9117, dtype=torch.float64), tensor(0.7660, dtype=torch.float64)]
>>> imbalance_gain(torch.tensor([0.1, 1.0, 10.0]))  # a model that shouts leaves nothing to the other
tensor([1.0945, 1.4142, 1.0945], dtype=torch.float64)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..._checks import integer

__all__ = ["Simulation", "spurious_accuracy", "imbalance_gain", "margin_ose", "margin_single", "margin_wse", "simulate"]

NODES = 200  # error of F_p below 1e-14 for 10 classes, 1e-9 for 100, 1e-6 for 1000
CHUNK = 1 << 22  # logits held at a time by simulate(): 34 MB for each of a few tensors
Number = float | Tensor


class Simulation(NamedTuple):
    """Result of :func:`simulate`: shares of the draws."""

    first: float  # accuracy of the first model
    second: float  # of the second
    ose: float  # of the sum of their outputs
    wse: float  # of the average of their weights
    fft_ose: float  # both models wrong, the sum of outputs right
    fft_wse: float  # both models wrong, the average of weights right


def spurious_accuracy(x: Number, p: Number, classes: int | Tensor) -> Tensor:
    r"""The accuracy :math:`F_p(x)` of a margin x, in float64; all arguments broadcast.

    At p = 0 nothing fails: 1 for x > 0. An infinite x (no spurious feature) gives 1.

    Raises:
        ValueError: p outside [0, 1], or fewer than two classes.
    """
    x, p, k = (torch.as_tensor(t, dtype=torch.float64) for t in (x, p, classes))
    _check_p(p)
    _check_classes(k)
    u, weight = (torch.from_numpy(t).to(x.device) for t in _hermite(NODES))
    full: Sequence[Tensor] = torch.broadcast_tensors(x, p.to(x.device), k.to(x.device))
    x, p, k = (t[..., None] for t in full)
    own = (p / k).sqrt()
    common = (p * (k + 1 - p * k) / k).sqrt()
    # eq-bang-accuracy:  P(own max_k e_k + common u < x).  Given u this is the integral above, whose integrand is nearly
    # a step for large K. Given the largest e instead, of density (K-1) phi(e) Phi(e)^(K-2), it is smooth.
    density = (k - 1) * weight * torch.exp((k - 2) * torch.special.log_ndtr(u))
    f = (density * torch.special.ndtr((x - own * u) / common)).sum(-1)
    x, p, k = full
    return torch.where(p > 0, f.clamp(0, 1), torch.heaviside(x, 1 / k))


def margin_single(p: Number, n_v: Number, n_s: Number) -> Tensor:
    """Mean margin over its scale (eq-bang-single) of a model with ``n_v`` invariant and ``n_s`` spurious features.

    Infinite without spurious features. All arguments broadcast; so they do in the functions below.

    Raises:
        ValueError: p outside [0, 1], a negative number of features, or none at all.
    """
    p, n_v, n_s, *_ = _features(p, n_v, n_s)
    # eq-bang-single:  ((1 - p) n_s + n_v) / sqrt(n_s)
    return ((1 - p) * n_s + n_v) / n_s.sqrt()


def margin_ose(
    p: Number,
    n_v: Number,
    n_s: Number,
    n_v2: Number | None = None,
    n_s2: Number | None = None,
    *,
    n_vo: Number = 0,
    n_so: Number = 0,
    scale: Number = 1.0,
) -> Tensor:
    """Margin of the output-space ensemble, the sum of the logits (eq-bang-ose).

    Args:
        p: probability that a spurious feature is drawn anew.
        n_v: invariant features of the first model.
        n_s: its spurious features.
        n_v2: invariant features of the second (as many as the first).
        n_s2: its spurious features (as many as the first).
        n_vo: invariant features that both have; a sum of logits does not depend on it.
        n_so: spurious features that both have.
        scale: factor of the second model's logits, > 0.

    Raises:
        ValueError: as :func:`margin_single`; more shared features than a model has; a scale that is not positive.
    """
    p, n_v, n_s, n_v2, n_s2, n_vo, n_so = _features(p, n_v, n_s, n_v2, n_s2, n_vo, n_so)
    (lam,) = _scales(scale=scale)
    # eq-bang-ose:  own features count 1 and lambda, shared ones 1 + lambda
    mean = (1 - p) * (n_s + lam * n_s2) + n_v + lam * n_v2
    return mean / (n_s + lam**2 * n_s2 + 2 * lam * n_so).sqrt()


def margin_wse(
    p: Number,
    n_v: Number,
    n_s: Number,
    n_v2: Number | None = None,
    n_s2: Number | None = None,
    *,
    n_vo: Number = 0,
    n_so: Number = 0,
    scale: Number = 1.0,
    feature_scale: Number = 1.0,
) -> Tensor:
    """Margin of the weight-space ensemble, whose head and features are both averaged (eq-bang-wse).

    Args:
        p: probability that a spurious feature is drawn anew.
        n_v: invariant features of the first model.
        n_s: its spurious features.
        n_v2: invariant features of the second (as many as the first).
        n_s2: its spurious features (as many as the first).
        n_vo: invariant features that both have.
        n_so: spurious features that both have.
        scale: factor a of the second model's head.
        feature_scale: factor b of its features; a model whose layers all grow by ``c`` has a = b = c, so its logits
            grow by ``c ** 2``.
    """
    p, n_v, n_s, n_v2, n_s2, n_vo, n_so = _features(p, n_v, n_s, n_v2, n_s2, n_vo, n_so)
    a, b = _scales(scale=scale, feature_scale=feature_scale)
    # eq-bang-wse:  own features count 1 and ab, shared ones (1 + a)(1 + b)
    both = (1 + a) * (1 + b)
    mean = (1 - p) * (n_s + a * b * n_s2 + (a + b) * n_so) + n_v + a * b * n_v2 + (a + b) * n_vo
    return mean / (n_s + (a * b) ** 2 * n_s2 + (both**2 - 1 - (a * b) ** 2) * n_so).sqrt()


def imbalance_gain(scale: Number) -> Tensor:
    r"""The factor :math:`(1+\lambda)/\sqrt{1+\lambda^2}` by which a partner raises the margin (eq-bang-gain).

    The largest, :math:`\sqrt2`, is at :math:`\lambda=1`; :math:`\lambda` and :math:`1/\lambda` give the same.
    """
    (lam,) = _scales(scale=scale)
    # eq-bang-gain
    return (1 + lam) / (1 + lam**2).sqrt()


def simulate(
    p: float,
    n_v: int,
    n_s: int,
    n_v2: int | None = None,
    n_s2: int | None = None,
    *,
    classes: int,
    generator: torch.Generator,
    n_vo: int = 0,
    n_so: int = 0,
    scale: float = 1.0,
    feature_scale: float = 1.0,
    draws: int = 100_000,
    noise: float = 1e-6,
) -> Simulation:
    """Count features of random samples instead of trusting the central limit theorem.

    The sum of outputs is that of :func:`margin_ose` with its scale equal to ``scale * feature_scale``.

    Args:
        p: probability that a spurious feature is drawn anew.
        n_v: invariant features of the first model.
        n_s: its spurious features.
        n_v2: invariant features of the second (as many as the first).
        n_s2: its spurious features (as many as the first).
        n_vo: invariant features that both have.
        n_so: spurious features that both have.
        scale: factor a of the second model's head.
        feature_scale: factor b of its features.
        classes: K >= 2.
        generator: draws are made on its device.
        draws: samples; a share s of them has the standard error ``(s (1 - s) / draws) ** 0.5``.
        noise: standard deviation of each feature. So small it only breaks ties, alike in all that share the feature:
            a model averaged with itself predicts what it did.

    Raises:
        ValueError: as :func:`margin_wse`; also numbers of features, classes or draws that are not whole.
    """
    _, *counts = _features(p, n_v, n_s, n_v2, n_s2, n_vo, n_so)
    if any(n != n.round() for n in counts):
        raise ValueError(f"features: expected whole numbers, got {[n.item() for n in counts]}")
    n_v, n_s, n_v2, n_s2, n_vo, n_so = (int(n) for n in counts)
    a, b = (t.item() for t in _scales(scale=scale, feature_scale=feature_scale))
    k = integer("classes", classes, 2)
    integer("draws", draws, 1)
    groups = ((n_v - n_vo, n_s - n_so), (n_v2 - n_vo, n_s2 - n_so), (n_vo, n_so))  # of the first, the second, of both
    hits = torch.zeros(6, dtype=torch.float64)
    for rows in torch.arange(draws).split(max(CHUNK // k, 1)):
        own, own2, shared = (_votes(len(rows), k, p, *group, noise, generator) for group in groups)
        ose = own + a * b * own2 + (1 + a * b) * shared
        wse = own + a * b * own2 + (1 + a) * (1 + b) * shared
        logits = (own + shared, own2 + shared, ose, wse)
        right = torch.stack([z.argmax(-1) == 0 for z in logits])  # by symmetry class 0 is the right one
        rescued = ~right[0] & ~right[1] & right[2:]
        hits += torch.cat((right, rescued)).sum(1).cpu()
    return Simulation(*(hits / draws).tolist())


def _votes(
    rows: int, classes: int, p: float, invariant: int, spurious: int, noise: float, generator: torch.Generator
) -> Tensor:
    """``(rows, classes)``: how many of a group of features point to each class, of which class 0 is the right one."""
    device = generator.device
    votes = torch.zeros(rows, classes, dtype=torch.float64, device=device)
    # The counts are multinomial: class by class binomial in what is left, at no memory for single features.
    left = torch.full((rows,), float(spurious), dtype=torch.float64, device=device)
    for k in range(classes - 1):
        share = 1 - p + p / classes if k == 0 else 1 / (classes - k)
        votes[:, k] = torch.binomial(left, torch.full_like(left, share), generator=generator)
        left = left - votes[:, k]
    votes[:, -1] = left
    votes[:, 0] += invariant
    jitter = torch.randn(votes.shape, generator=generator, dtype=votes.dtype, device=device)
    return votes.add_(jitter, alpha=noise * (invariant + spurious) ** 0.5)


@functools.cache
def _hermite(n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Nodes and weights of Gauss-Hermite quadrature for the mean over a standard normal variable."""
    u, weight = np.polynomial.hermite_e.hermegauss(n)
    return u, weight / weight.sum()


def _features(
    p: Number,
    n_v: Number,
    n_s: Number,
    n_v2: Number | None = None,
    n_s2: Number | None = None,
    n_vo: Number = 0,
    n_so: Number = 0,
) -> list[Tensor]:
    """p and the counts as float64, checked; a second model that is not given has as many features as the first."""
    share = torch.as_tensor(p, dtype=torch.float64)
    _check_p(share)
    second = {"n_v2": n_v if n_v2 is None else n_v2, "n_s2": n_s if n_s2 is None else n_s2}
    given = {"n_v": n_v, "n_s": n_s, **second, "n_vo": n_vo, "n_so": n_so}
    n = {name: torch.as_tensor(t, dtype=torch.float64) for name, t in given.items()}
    for name, t in n.items():
        if not (t.isfinite() & (t >= 0)).all():
            raise ValueError(f"{name}: expected numbers of features >= 0, got {t.tolist()}")
    for v, s in (("n_v", "n_s"), ("n_v2", "n_s2")):
        if not (n[v] + n[s] > 0).all():
            raise ValueError(f"n_v, n_s: expected at least one feature, got {n[v].tolist()} and {n[s].tolist()}")
    for name, one, other in (("n_vo", "n_v", "n_v2"), ("n_so", "n_s", "n_s2")):
        most = torch.minimum(n[one], n[other])
        if not (n[name] <= most).all():
            raise ValueError(f"{name}: expected no more than each model has, {most.tolist()}, got {n[name].tolist()}")
    return [share, *n.values()]


def _scales(**scales: Number) -> list[Tensor]:
    found = {name: torch.as_tensor(t, dtype=torch.float64) for name, t in scales.items()}
    for name, t in found.items():
        if not (t.isfinite() & (t > 0)).all():
            raise ValueError(f"{name}: expected positive numbers, got {t.tolist()}")
    return list(found.values())


def _check_p(p: Tensor) -> None:
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p: expected probabilities in [0, 1], got {p.tolist()}")


def _check_classes(classes: Tensor) -> None:
    if not ((classes >= 2) & (classes == classes.round())).all():
        raise ValueError(f"classes: expected integers >= 2, got {classes.tolist()}")
