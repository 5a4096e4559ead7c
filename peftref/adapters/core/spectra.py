r"""The directions in which rows of a matrix vary most, found batch by batch.

Two ways to the leading right singular vectors :math:`V` and singular values :math:`s` of centred rows
:math:`X-\mathbf 1\mu^\top` that never are in memory together. :class:`Moments` sums their products (eq-eva-moments) and
decomposes the sum once: exact, in any order of the batches. :func:`absorb` keeps the spectrum itself and takes a batch
into it (eq-eva-incremental): less memory for wide rows, and at every step there is a spectrum to look at, but what
falls out of the first ``k`` components is gone. It is the step of scikit-learn's ``IncrementalPCA``.

>>> import torch
>>> rows = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
>>> spectrum = absorb(None, rows, k=2)                    # more variance along the first axis
>>> spectrum.components, spectrum.ratio
(tensor([[1., 0.],
        [0., 1.]]), tensor([0.8000, 0.2000]))
>>> moments = Moments()
>>> for batch in rows.split(2):
...     moments.update(batch)
>>> torch.allclose(moments.spectrum(2).components, spectrum.components)
True
>>> turned = absorb(spectrum, torch.tensor([[0.0, 9.0], [0.0, -9.0]]), k=2)
>>> agreement(turned, spectrum, 1), agreement(turned, spectrum, 2, subspace=True)
(0.0, 1.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import integer, one_of

__all__ = ["Accumulator", "Moments", "Spectrum", "absorb", "agreement"]

ROUTES = ("auto", "gram", "incremental", "lowrank")
WIDE = 2048  # columns up to which the i x i scatter matrix is the cheapest way
SEED = 42  # of the first guess of the approximate way, as in PEFT


@dataclass(frozen=True)
class Spectrum:
    """The leading directions of some rows.

    Attributes:
        components: ``(k, i)``, orthonormal rows; of each the entry of largest size is positive.
        singular: ``(k,)``, falling; of the centred rows.
        mean: ``(i,)``; zero if the rows were not centred.
        count: number of rows, m.
        total: sum of the squares of the centred rows.
    """

    components: Tensor
    singular: Tensor
    mean: Tensor
    count: int
    total: float

    @property
    def ratio(self) -> Tensor:
        """Share of the variance that each component explains, ``(k,)`` (eq-eva-ratio); 0 if nothing varies."""
        # eq-eva-ratio:  xi_j = s_j^2 / ||X - 1 mu||_F^2
        return self.singular**2 / self.total if self.total > 0 else torch.zeros_like(self.singular)


def absorb(old: Spectrum | None, rows: Tensor, k: int, *, center: bool = True, lowrank: bool = False) -> Spectrum:
    """One step of incremental SVD (eq-eva-incremental): the spectrum of all rows so far, cut to ``k`` components.

    Args:
        old: of the rows so far; None at the start.
        rows: ``(n, i)``, n >= 1.
        k: components to keep, at most as many as there are.
        center: decompose the rows' deviations from their mean; False: the rows.
        lowrank: instead of an exact SVD, orthogonal iteration from the old components, much cheaper for many inputs.

    Raises:
        ValueError: no rows, rows of another width than those so far, or entries that are not finite.
    """
    _check(rows, len(old.mean) if old else None)
    integer("k", k, 1)
    n = len(rows)
    m = old.count if old else 0
    mean = rows.mean(0) if center else rows.new_zeros(rows.shape[1])
    stack = rows - mean
    total = float(stack.square().sum())
    if not math.isfinite(total):
        raise ValueError("rows: expected finite numbers, got NaN, infinity, or a sum of squares that overflows")
    if old:
        # eq-eva-incremental:  [diag(s) V; X - 1 mean; sqrt(m n / (m + n)) (mu - mean)] = U s' V'
        drift = (m * n / (m + n)) ** 0.5 * (old.mean - mean)
        stack = torch.cat([old.singular[:, None] * old.components, stack, drift[None]])  # (k + n + 1, i)
        total = old.total + total + float(drift.square().sum())
        mean = (m * old.mean + n * mean) / (m + n)
    if lowrank:
        singular, components = _iterate(stack, k, old)
    else:
        _, singular, components = torch.linalg.svd(stack, full_matrices=False)
    return Spectrum(_signed(components[:k]), singular[:k], mean, m + n, total)


class Moments:
    """Sums over rows from which their exact spectrum follows; an ``(i, i)`` matrix.

    Args:
        center: as in :func:`absorb`.
    """

    shift: Tensor
    sum: Tensor

    def __init__(self, center: bool = True) -> None:
        self.center = center
        self.count = 0

    def update(self, rows: Tensor) -> None:
        """Take ``(n, i)`` more rows in; multiplied in float64, where the squares of small singular values survive."""
        _check(rows, len(self.shift) if self.count else None)
        wide = rows.to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)
        if not self.count:
            i = rows.shape[1]
            self.like = rows.new_empty(0)
            # All rows are taken relative to the first batch's mean, or a large mean would drown what varies.
            self.shift = wide.mean(0) if self.center else wide.new_zeros(i)
            self.sum = wide.new_zeros(i)
            self.gram = wide.new_zeros(i, i)
        wide = wide - self.shift
        self.count += len(wide)
        self.sum += wide.sum(0)
        # eq-eva-moments:  G = sum (x - c)(x - c)^T
        self.gram.addmm_(wide.T, wide)

    def spectrum(self, k: int) -> Spectrum:
        """The ``k`` leading directions, in the type and on the device of the first rows.

        Raises:
            ValueError: no rows yet, or a ``k`` that is no positive integer.
        """
        integer("k", k, 1)
        if not self.count:
            raise ValueError("rows: expected some before a spectrum, got none")
        gram = self.gram
        if self.center:
            # eq-eva-moments:  (X - 1 mu)^T (X - 1 mu) = G - t t^T / m
            gram = gram.addr(self.sum, self.sum, alpha=-1 / self.count)
        values, vectors = torch.linalg.eigh(gram)  # rising
        singular = values.clamp_min(0).sqrt().flip(0)[:k]
        components = _signed(vectors.T.flip(0)[:k])
        mean = self.shift + self.sum / self.count if self.center else self.shift
        varying = float(gram.trace().clamp_min(0))
        return Spectrum(components.to(self.like), singular.to(self.like), mean.to(self.like), self.count, varying)


class Accumulator:
    """Rows on their way into a spectrum, by either way; batches with too few rows for ``k`` components are collected.

    Args:
        k: components to keep.
        route: "gram" (:class:`Moments`), "incremental" (:func:`absorb`), "lowrank" (:func:`absorb`, approximate), or
            "auto": "gram" up to 2048 columns, "lowrank" above.
        center: as in :func:`absorb`.
    """

    def __init__(self, k: int, *, route: str = "auto", center: bool = True) -> None:
        self.k = integer("k", k, 1)
        self.route = one_of("route", route, ROUTES)
        self.center = center
        self.moments: Moments | None = None
        self.state: Spectrum | None = None  # on the two routes of `absorb`
        self.before: Spectrum | None = None
        self.waiting: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Take ``(n, i)`` more rows in; none do no harm.

        Args:
            rows: real and finite.

        Raises:
            ValueError: no floating-point matrix; nothing has changed then.
        """
        if rows.ndim == 2 and not len(rows):
            return
        _check(rows, None)
        route = self.route
        if route == "auto":
            route = "gram" if rows.shape[1] <= WIDE else "lowrank"
        if route == "gram":
            self.moments = self.moments or Moments(self.center)
            self.moments.update(rows)
            return
        self.waiting.append(rows)
        if self.state or sum(map(len, self.waiting)) >= self.k:
            self._absorb(route == "lowrank")

    def moved(self, r: int, tau: float, *, subspace: bool = False) -> bool:
        """Whether the first ``r`` directions have moved in the last step: their :func:`agreement` is below ``tau``.

        Args:
            r: directions that count.
            tau: similarity at which they rest.
            subspace: as in :func:`agreement`.
        """
        if self.before is None or self.state is None:
            return True
        return agreement(self.state, self.before, r, subspace=subspace) < tau

    def finish(self) -> Spectrum | None:
        """The spectrum of all rows; None if there were none."""
        if self.waiting:  # fewer rows in all than components were wanted
            self._absorb(lowrank=False)
        if self.moments and not self.state:
            self.state = self.moments.spectrum(self.k)
        return self.state

    def _absorb(self, lowrank: bool) -> None:
        new = torch.cat(self.waiting)
        self.waiting = []
        self.before = self.state
        self.state = absorb(self.state, new, self.k, center=self.center, lowrank=lowrank)


def agreement(new: Spectrum, old: Spectrum, r: int, *, subspace: bool = False) -> float:
    """How much the first ``r`` directions have stayed as they were (eq-eva-agreement): 1 if they have not moved.

    The least signed cosine between a new component and the old one in its place; or, for spectra with equal values,
    whose components keep turning within their plane, the mean squared cosine between the subspaces.
    """
    a = new.components[:r]
    b = old.components[:r]
    if len(b) < len(a):
        return 0.0
    # eq-eva-agreement:  min_j v'_j . v_j,   or   ||V' V^T||_F^2 / r
    return float((a @ b.T).square().sum() / max(r, 1)) if subspace else min([1.0, *(a * b).sum(1).tolist()])


def _iterate(stack: Tensor, k: int, old: Spectrum | None) -> tuple[Tensor, Tensor]:
    """Leading singular values and right vectors by orthogonal iteration; PEFT's ``svd_lowrank`` starts from noise."""
    q = min(2 * k, *stack.shape)
    guess = torch.randn(stack.shape[1], q, generator=torch.Generator().manual_seed(SEED)).to(stack)
    if old:
        known = old.components[:q]
        guess[:, : len(known)] = known.T
    for _ in range(2 if old else 4):
        # Normal on either side, for S^T S in one go would leave of a small singular value only its square.
        guess = torch.linalg.qr(stack.T @ torch.linalg.qr(stack @ guess).Q).Q
    _, singular, turn = torch.linalg.svd(stack @ guess, full_matrices=False)
    return singular, turn @ guess.T


def _signed(components: Tensor) -> Tensor:
    """Of each row the entry of largest size is made positive, so that one direction always has the same sign."""
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * torch.where(largest < 0, -1, 1)


def _check(rows: Tensor, width: int | None) -> None:
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point() or width not in (None, rows.shape[1]):
        raise ValueError(f"rows: expected real (n, {width or 'i'}), n >= 1, got {rows.dtype} {tuple(rows.shape)}")
