r"""A linear discriminant head that learns class after class, exactly as if it had seen everything at once.

Of the features :math:`\phi\in\mathbb R^d` of a frozen body it keeps, per class, the count :math:`n_c` and the mean
:math:`\mu_c`, and for all classes together the scatter within them (eq-fsa-moments)

.. math:: W=\sum_c\sum_{i\in c}(\phi_i-\mu_c)(\phi_i-\mu_c)^\top .

Two disjoint sets a and b merge without their samples (eq-fsa-merge; Chan, Golub, LeVeque, 1983)

.. math:: \mu_c=\frac{n_c^a\mu_c^a+n_c^b\mu_c^b}{n_c^a+n_c^b},\qquad
          W=W^a+W^b+\sum_c\frac{n_c^an_c^b}{n_c^a+n_c^b}(\mu_c^a-\mu_c^b)(\mu_c^a-\mu_c^b)^\top,

so memory is :math:`d^2+Kd` whatever the number of samples, and the order in which they came leaves no trace. With
:math:`\mu` the mean and n the number of all samples, the scatter of all features is (eq-fsa-total)

.. math:: T=W+\sum_cn_c(\mu_c-\mu)(\mu_c-\mu)^\top .

The covariance is :math:`S=T/(n-1)` (``scatter="total"``) or :math:`W/(n-K)` (``"within"``), with a ridge
:math:`\tilde S=S+(\lambda+\rho\,\mathrm{tr}S/d)I` (eq-fsa-covariance), and the logits are (eq-fsa-logits)

.. math:: z_c=\phi^\top w_c+b_c,\qquad w_c=\tilde S^{-1}\mu_c,\qquad b_c=-\tfrac12\mu_c^\top w_c+\log\pi_c .

===============================  =============================  =====================  ==========
argument                         here                           official code          shape
===============================  =============================  =====================  ==========
``features``                     :math:`\phi`                   ``features``           ``(N, d)``
``counts``, ``means``            :math:`n_c,\ \mu_c`            class means            ``(K,), (K, d)``
``within``                       :math:`W`                      --                     ``(d, d)``
``scatter``                      :math:`S`                      total                  --
``ridge``, ``ridge_rel``         :math:`\lambda,\ \rho`         1, 0                   scalars
``prior``                        :math:`\pi`                    none                   --
===============================  =============================  =====================  ==========

Differs from the official code, `aresPanos/fsa@e151d896
<https://github.com/aresPanos/fsa/tree/e151d896657246733da62f6ba552b4c23485cd28>`_:

- It collects the features of all sessions and fits anew (``src/methods/cil_trainer.py#L101-L123``); here moments are
  merged. They are *centred* and in float64, as raw second moments lose all digits when means are large.
- Its classes without samples keep a column of zeros (``src/utils.py#L115``), so a logit of 0, which wins whenever all
  others are negative; here they have a bias of minus infinity.
- Its bias is :math:`\mu_c^\top w_c` (``src/utils.py#L123``), halved where it is used
  (``src/methods/cil_trainer.py#L268``); here the bias is what is added.
- Its ridge is 1 (``src/utils.py#L112``); here it may also be relative, and then nothing depends on the scale.

>>> import torch
>>> phi, y = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 1.0], [12.0, 1.0]]), torch.tensor([7, 7, 3, 3])
>>> head = LDA().partial_fit(phi[:2], y[:2])
>>> head.partial_fit(phi[2:], y[2:]).classes_
tensor([3, 7])
>>> head.predict(torch.tensor([[1.5, 0.0], [9.0, 1.0]]))
tensor([7, 3])
>>> torch.equal(head.coef_, LDA().partial_fit(phi, y).coef_)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import number, one_of

__all__ = ["LDA", "Moments", "discriminant", "merge", "moments"]

SCATTERS = ("total", "within")
PRIORS = (None, "empirical")


class Moments(NamedTuple):
    """All that is kept of the features of K classes: counts n_c, means mu_c, and W, the scatter within classes.

    In float64. A class without samples has count and mean 0.
    """

    counts: Tensor  # (K,)
    means: Tensor  # (K, d)
    within: Tensor  # (d, d)

    def total(self) -> Tensor:
        """Scatter of all features around their common mean, T = W + sum_c n_c (mu_c - mu)(mu_c - mu)^T, ``(d, d)``."""
        mean = self.counts @ self.means / self.counts.sum()
        # eq-fsa-total:  T = W + sum_c n_c (mu_c - mu)(mu_c - mu)^T
        between = self.counts.sqrt()[:, None] * (self.means - mean)
        return self.within + between.T @ between


def moments(features: Tensor, codes: Tensor, classes: int) -> Moments:
    """Moments of one set of features, W = sum_i (phi_i - mu_{y_i})(phi_i - mu_{y_i})^T (eq-fsa-moments).

    Args:
        features: ``(N, d)``.
        codes: class of each, 0 to K - 1, ``(N,)``.
        classes: K.
    """
    x = features.double()
    counts = torch.bincount(codes, minlength=classes).to(x)
    sums = x.new_zeros(classes, x.shape[1]).index_add_(0, codes, x)  # (K, d); N d additions, where Y^T X has N d K
    means = sums / counts.clamp_min(1)[:, None]
    # eq-fsa-moments:  W = sum_i (phi_i - mu_{y_i})(phi_i - mu_{y_i})^T
    centred = x - means[codes]
    return Moments(counts, means, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets of samples over the same classes (eq-fsa-merge).

    W = W_a + W_b + sum_c (n_a n_b / (n_a + n_b)) (mu_a - mu_b)(mu_a - mu_b)^T.

    Args:
        a: of the one set.
        b: of the other.

    Raises:
        ValueError: other numbers of classes or features.
    """
    if a.means.shape != b.means.shape:
        raise ValueError(f"b: expected means of shape {tuple(a.means.shape)}, as in a, got {tuple(b.means.shape)}")
    counts = a.counts + b.counts
    delta = b.means - a.means
    # eq-fsa-merge; a class that only one side knows moves no mean and adds no scatter
    means = a.means + (b.counts / counts.clamp_min(1))[:, None] * delta
    moved = (a.counts * b.counts / counts.clamp_min(1)).sqrt()[:, None] * delta
    return Moments(counts, means, a.within + b.within + moved.T @ moved)


def discriminant(
    m: Moments, scatter: str = "total", ridge: float = 1.0, ridge_rel: float = 0.0, prior: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Weights ``(K, d)`` and biases ``(K,)``: w_c = S^-1 mu_c, b_c = -mu_c.w_c / 2 + log pi_c (eq-fsa-logits).

    Args:
        m: of one sample or more.
        scatter: ``"total"`` (official code) or ``"within"`` (textbook).
        ridge: :math:`\lambda`, in squared units of the features (1: official code, for EfficientNet's features).
        ridge_rel: :math:`\rho`, as a share of the mean variance (0; ours).
        prior: None for uniform (official code), ``"empirical"`` for the shares of the classes in ``m``.

    Raises:
        ValueError: bad settings, no samples, or a covariance that is singular and has no ridge.
    """
    _check(scatter, ridge, ridge_rel, prior)
    n = m.counts.sum()
    d = m.within.shape[0]
    seen = m.counts > 0
    if not seen.any():
        raise ValueError("moments: expected those of one sample or more, got none")
    # eq-fsa-covariance:  S = T/(n - 1) or W/(n - K);  of a single sample, or one for each class, it is 0
    S = m.total() / (n - 1).clamp_min(1) if scatter == "total" else m.within / (n - seen.sum()).clamp_min(1)
    S = S + (ridge + ridge_rel * S.trace() / d) * torch.eye(d, dtype=S.dtype, device=S.device)
    factor, failed = torch.linalg.cholesky_ex(S)
    pivots = factor.diagonal()
    if failed or pivots.min() ** 2 <= d * torch.finfo(S.dtype).eps * pivots.max() ** 2:
        raise ValueError(f"ridge: expected more than {ridge:g}, as the covariance of {int(n)} samples is singular")
    # eq-fsa-logits:  w_c = S^-1 mu_c,  b_c = - mu_c.w_c / 2 + log pi_c
    coef = torch.cholesky_solve(m.means.T, factor).T.contiguous()  # (K, d)
    bias = -(m.means * coef).sum(1) / 2
    if prior == "empirical":
        bias = bias + (m.counts / n).log()
    return coef, bias.masked_fill(~seen, -math.inf)  # what was never seen never wins


class LDA(nn.Module):
    """Discriminant head in the manner of scikit-learn: ``partial_fit(features, labels)``, ``predict(features)``.

    The logits are z_c = phi.w_c + b_c with w_c = S^-1 mu_c and b_c = -mu_c.w_c / 2 + log pi_c.

    The weights are computed when they are first asked for, and kept until something new was learned. All of its state
    is in ``state_dict()``, settings included, which loads into a head of any size and other settings. Statistics
    stay in float64 under ``.half()``.

    Args:
        scatter: "total" or "within", see :func:`discriminant`.
        ridge: absolute, in squared units of the features.
        ridge_rel: as a share of the mean variance.
        prior: None (uniform) or "empirical".

    Attributes:
        classes_: the labels seen, sorted, ``(K,)``; row c of ``coef_`` belongs to ``classes_[c]``.
    """

    classes_: Tensor
    counts: Tensor
    means: Tensor
    within: Tensor

    def __init__(
        self, scatter: str = "total", ridge: float = 1.0, ridge_rel: float = 0.0, prior: str | None = None
    ) -> None:
        super().__init__()
        _check(scatter, ridge, ridge_rel, prior)
        self.settings: dict[str, Any] = {"scatter": scatter, "ridge": ridge, "ridge_rel": ridge_rel, "prior": prior}
        self.register_buffer("classes_", torch.zeros(0, dtype=torch.long))
        for name, shape in (("counts", (0,)), ("means", (0, 0)), ("within", (0, 0))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self._fitted: tuple[Tensor, Tensor] | None = None

    @property
    def moments(self) -> Moments:
        """Moments of all samples so far, classes in the order of ``classes_``."""
        return Moments(self.counts, self.means, self.within)

    @torch.no_grad()
    def partial_fit(self, features: Tensor, labels: Tensor) -> LDA:
        """Take in samples of old or new classes, in any order; the head moves to their device.

        Args:
            features: ``(N, d)``, any floating type; N may be 0.
            labels: ``(N,)``, any integers.

        Raises:
            TypeError, ValueError: wrong types or shapes, or a feature that is not finite. Nothing has changed then.
        """
        x = self._features(features)
        y = torch.as_tensor(labels, device=x.device)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"labels: expected integers, got {y.dtype}")
        if y.shape != x.shape[:1]:
            raise ValueError(f"labels: expected shape ({len(x)},), one for each row of features, got {tuple(y.shape)}")
        if broken := int((~x.isfinite()).any(1).sum()):
            raise ValueError(f"features: expected finite numbers, got {broken} rows of {len(x)} that have others")
        with torch.inference_mode(False):  # what is kept must serve outside of inference mode too
            old = self.classes_.to(x.device)
            classes, joint = torch.cat([old, y.long()]).unique(return_inverse=True)
            places, codes = joint.tensor_split([len(old)])
            known = Moments(
                x.new_zeros(len(classes), dtype=torch.float64).index_copy_(0, places, self.counts.to(x.device)),
                x.new_zeros(len(classes), x.shape[1], dtype=torch.float64),
                self.within.to(x.device) if len(old) else x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64),
            )
            known.means[places] = self.means.to(x.device).view(len(old), x.shape[1])
            self._set(classes, merge(known, moments(x, codes, len(classes))))
        return self

    @property
    def coef_(self) -> Tensor:
        """Weights :math:`w_c`, ``(K, d)``, float64."""
        return self._weights()[0]

    @property
    def intercept_(self) -> Tensor:
        """Biases :math:`b_c`, to be added, ``(K,)``, float64."""
        return self._weights()[1]

    def decision_function(self, features: Tensor) -> Tensor:
        """Logits of the classes seen, ``(N, d) -> (N, K)``; float32, or float64 for features in float64."""
        x = self._features(features)
        coef, intercept = (t.to(x.device) for t in self._weights())
        # eq-fsa-logits:  z_c = phi.w_c + b_c, in float64: large terms that all classes share cancel only there
        return (x.double() @ coef.T + intercept).to(torch.promote_types(x.dtype, torch.float32))

    forward = decision_function

    def predict(self, features: Tensor) -> Tensor:
        """Labels, ``(N, d) -> (N,)``."""
        return self.classes_.to(features.device)[self.decision_function(features).argmax(-1)]

    def _weights(self) -> tuple[Tensor, Tensor]:
        if not len(self.classes_):
            raise RuntimeError("LDA: expected partial_fit with one sample or more first, got none yet")
        if self._fitted is None:
            with torch.inference_mode(False), torch.no_grad():
                self._fitted = discriminant(self.moments, **self.settings)
        return self._fitted

    def _features(self, features: Tensor) -> Tensor:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a floating-point tensor (N, d), got {got}")
        d = features.shape[-1] if features.ndim else 0
        if len(self.classes_):
            d = self.means.shape[1]
        if features.ndim != 2 or features.shape[1] != d or d == 0:
            raise ValueError(f"features: expected shape (N, {d or 'd'}), got {tuple(features.shape)}")
        return features

    def _set(self, classes: Tensor, m: Moments) -> None:
        self.classes_ = classes
        self.counts, self.means, self.within = m
        self._fitted = None

    def get_extra_state(self) -> Tensor:
        """The settings as numbers: scatter, ridge, ridge_rel, prior."""
        scatter, ridge, ridge_rel, prior = self.settings.values()
        return torch.tensor([SCATTERS.index(scatter), ridge, ridge_rel, PRIORS.index(prior)], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave."""
        scatter, ridge, ridge_rel, prior = state.tolist()
        values = (SCATTERS[int(scatter)], ridge, ridge_rel, PRIORS[int(prior)])
        _check(*values)
        self.settings = dict(zip(self.settings, values, strict=True))
        self._fitted = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LDA:
        # .to(), .cuda(), .half() ...: the device changes, never the precision
        device = fn(torch.zeros(0, device=self.within.device)).device
        self._set(self.classes_.to(device), Moments(*(t.to(device) for t in self.moments)))
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # a head grows: stored sizes are taken over; a state of before settings were kept leaves them as they are
        state.setdefault(prefix + "_extra_state", self.get_extra_state())
        own: list[Any] = [state.get(prefix + name) for name in ("classes_", *Moments._fields)]
        if all(t is not None for t in own):
            shapes = [tuple(t.shape) for t in own]
            k, d = (*shapes[2], 0, 0)[:2]
            if shapes != [(k,), (k,), (k, d), (d, d)]:
                args[-1].append(f"{prefix}state: expected shapes (K,), (K,), (K, d), (d, d), got {shapes}")
                return
            classes, *rest = (t.detach().to(self.within.device, copy=True) for t in own)
            self._set(classes, Moments(*(t.double() for t in rest)))
        super()._load_from_state_dict(state, prefix, *args)


def _check(scatter: str, ridge: float, ridge_rel: float, prior: str | None) -> None:
    one_of("scatter", scatter, SCATTERS)
    one_of("prior", prior, PRIORS)
    number("ridge", ridge, 0.0)
    number("ridge_rel", ridge_rel, 0.0)
