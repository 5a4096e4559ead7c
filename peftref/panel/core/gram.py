r"""Ridge regression from cross-products: all models of a cross-fit, from one pass over the data.

Let :math:`w_r` hold the features f and the targets y of row r. Fold j has the count :math:`n_j`, the sums
:math:`s_j=\sum_{r\in j}w_r` and the Gram matrix :math:`G_j=\sum_{r\in j}w_rw_r^\top`; what trains the model of fold k
is the sum of those it keeps (eq-dml_panel-gram),

.. math:: (n,s,G)_{(k)}=\sum_j\text{keep}_{kj}\,(n,s,G)_j ,

so the data are read once, not once for each fold. With means :math:`m=s/n`, covariances :math:`C=G/n-mm^\top` and
scales :math:`\sigma^2=\mathrm{diag}\,C_{ff}` the model is (eq-dml_panel-ridge)

.. math:: b=\bigl(n\,\sigma^{-1}C_{ff}\,\sigma^{-1}+\alpha I\bigr)^{-1}n\,\sigma^{-1}C_{fy},\qquad
          \hat y=m_y+(f-m_f)^\top\sigma^{-1}b .

That is ridge regression on features that are standardised on the training rows, with a free intercept. Of several
penalties each model takes the one that predicts best when the folds it keeps are left out in turn, so tuning follows
the outer scheme; the errors too are read off the Gram matrices.

>>> rows = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 5.0, 7.0]]], dtype=torch.float64)  # f, and y = 1 + 2 f
>>> columns, counts, _ = by_fold(rows, torch.tensor([[0, 0, 1, 1]]), 2)
>>> apart, one = ~torch.eye(2, dtype=torch.bool), torch.tensor([1])
>>> slope, intercept = fit(moments(columns, counts), apart, one - 1, one, [0.0])
>>> slope.flatten().round(decimals=6), intercept.flatten().round(decimals=6)
(tensor([2., 2.], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "by_fold", "fit", "inverse_times", "moments", "standardised"]


PIECE = 1 << 24  # numbers in the Gram matrices of one piece of the inner models


class Moments(NamedTuple):
    """Counts ``(..., K)``, sums ``(..., K, P)`` and Gram matrices ``(..., K, P, P)`` of the columns in each fold."""

    n: Tensor
    s: Tensor
    g: Tensor

    def kept(self, keep: Tensor) -> Moments:
        """Those of the rows that each model keeps: sums over the folds j with ``keep[k, j]``."""
        # eq-dml_panel-gram:  (n, s, G)_(k) = sum_j keep_kj (n, s, G)_j
        keep = keep.to(self.g.dtype)
        return Moments(self.n @ keep.T, keep @ self.s, torch.einsum("kj,...jpq->...kpq", keep, self.g))


def by_fold(rows: Tensor, fold: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``(B, P, n)`` sorted into folds ``(B, K, P, m)``, zeros behind; the counts, and where each row went."""
    batch, n = fold.shape
    counts = torch.zeros(batch, k, dtype=torch.long, device=fold.device).scatter_add_(1, fold, torch.ones_like(fold))
    m = int(counts.max())
    order = fold.argsort(dim=1, stable=True)
    start = counts.cumsum(1) - counts
    sorted_fold = fold.gather(1, order)
    slot = sorted_fold * m + torch.arange(n, device=fold.device) - start.gather(1, sorted_fold)
    place = torch.empty_like(slot).scatter_(1, order, slot)
    full = bool((counts == m).all())
    source = torch.full((batch, k * m), 0 if full else n, device=fold.device).scatter_(1, slot, order)
    rows = rows if full else torch.nn.functional.pad(rows, (0, 1))  # a row of zeros to fill up with
    index = source.view(batch, k, 1, m).expand(-1, -1, rows.shape[1], -1)
    return rows.unsqueeze(1).expand(-1, k, -1, -1).gather(-1, index), counts, place


def moments(columns: Tensor, counts: Tensor) -> Moments:
    """Of columns ``(B, K, P, m)`` that are sorted into folds, zeros behind, with counts ``(B, K)``."""
    flat = columns.flatten(0, 1)
    gram = torch.bmm(flat, flat.mT).unflatten(0, columns.shape[:2])
    return Moments(counts.to(columns.dtype), columns.sum(-1), gram)


def can_compare(counts: Tensor, keep: Tensor, scheme: Tensor | None = None) -> bool:
    """Whether each model has rows to learn from when any of the folds that it keeps is left out.

    Args:
        counts: of the rows in each fold, ``(..., K)``.
        keep: ``(M, K)``, which folds train which model.
        scheme: ``(K, K)``, which folds train the model of which (as ``keep``, if that is square; else all others).
    """
    _, inner, trained = _left_out(keep, scheme)
    rows = counts.double() @ trained.double().T
    return len(inner) > 0 and bool(((rows > 0) | (counts[..., inner] == 0)).all())


def fit(
    parts: Moments,
    keep: Tensor,
    columns: Tensor,
    targets: Tensor,
    alphas: list[float],
    scheme: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Slopes ``(..., K, p, q)`` and intercepts ``(..., K, q)``, each at the best of the penalties."""
    slopes, intercepts = _solve(parts.kept(keep), columns, targets, alphas)
    if len(alphas) == 1:
        return slopes[0], intercepts[0]
    best = _inner_error(parts, keep, columns, targets, alphas, scheme).argmin(0, keepdim=True)
    slope = slopes.gather(0, best.unsqueeze(-2).expand(1, *slopes.shape[1:]))
    return slope.squeeze(0), intercepts.gather(0, best).squeeze(0)


def _left_out(keep: Tensor, scheme: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Model (k, j) learns what k and j both keep, and is judged on fold j: the k, the j, and what each keeps."""
    k = keep.shape[1]
    outer, inner = keep.nonzero(as_tuple=True)
    trained = keep[outer] & ~torch.eye(k, dtype=torch.bool, device=keep.device)[inner]
    if scheme is None and len(keep) == k > 1:
        scheme = keep
    return outer, inner, trained if scheme is None else trained & scheme[inner]


def _inner_error(
    parts: Moments, keep: Tensor, columns: Tensor, targets: Tensor, alphas: list[float], scheme: Tensor | None
) -> Tensor:
    """Sum over the folds that each model keeps of the squared errors when that fold is left out, ``(A, ..., K, q)``."""
    outer, inner, trained = _left_out(keep, scheme)
    if not can_compare(parts.n, keep, scheme):
        raise ValueError("alpha: expected enough folds to leave one out of each training set and learn from the rest")
    each = max(1, PIECE // (len(columns) ** 2 * parts.n[..., 0].numel()))
    shape = (len(alphas), *parts.n.shape[:-1], len(keep), len(targets))
    total = parts.g.new_zeros(shape)
    for some in torch.arange(len(inner), device=inner.device).split(each):
        judged = Moments(*(t.index_select(-i, inner[some]) for t, i in zip(parts, (1, 2, 3), strict=True)))
        error = _error(parts.kept(trained[some]), judged, columns, targets, alphas)
        total = total.index_add(-2, outer[some], error)
    return total


def _error(train: Moments, judged: Moments, columns: Tensor, targets: Tensor, alphas: list[float]) -> Tensor:
    """Squared errors ``(A, ..., K, q)`` of what the first rows teach, on the second."""
    n, s, g = judged
    slope, intercept = _solve(train, columns, targets, alphas)
    gff = g[..., columns[:, None], columns]
    gfy = g[..., columns[:, None], targets]
    gyy = g[..., targets, targets]
    sf = s[..., columns]
    sy = s[..., targets]
    # sum (y - a - f'b)^2, with a = intercept and b = slope
    quadratic = (slope * (gff @ slope)).sum(-2)
    cross = (slope * (gfy - sf.unsqueeze(-1) * intercept.unsqueeze(-2))).sum(-2)
    error = gyy + quadratic + n.unsqueeze(-1) * intercept.square() - 2 * cross - 2 * intercept * sy
    return torch.where(n.unsqueeze(-1) > 0, error, 0.0)  # an empty fold judges nobody


def _solve(train: Moments, columns: Tensor, targets: Tensor, alphas: list[float]) -> tuple[Tensor, Tensor]:
    """Slopes ``(A, ..., K, p, q)`` and intercepts ``(A, ..., K, q)`` at each penalty."""
    mean, scale, corr, cross = standardised(train, columns, targets)
    a = train.n[..., None, None] * corr
    # eq-dml_panel-ridge:  b = (n R + alpha I)^-1 n c;  y = m_y + (f - m_f)' b / sigma
    slope = torch.stack([inverse_times(a, cross, alpha) for alpha in alphas]) / scale.unsqueeze(-1)
    intercept = mean[..., targets] - (slope * mean[..., columns].unsqueeze(-1)).sum(-2)
    return slope, intercept


def standardised(train: Moments, columns: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, scales, the features' correlations, and n times their standardised covariances with the targets.

    A feature that is constant in the training rows has an infinite scale: all that it is part of becomes zero.
    """
    n = train.n[..., None, None]
    mean = train.s / train.n.unsqueeze(-1)
    cov = train.g / n - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    variance = cov.diagonal(dim1=-2, dim2=-1)[..., columns]
    flat = variance <= 1e-13 * (train.g.diagonal(dim1=-2, dim2=-1)[..., columns] / train.n.unsqueeze(-1))
    scale = torch.where(flat, torch.inf, variance.clamp(min=0).sqrt())
    corr = cov[..., columns[:, None], columns] / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    return mean, scale, corr, n * cov[..., columns[:, None], targets] / scale.unsqueeze(-1)


def inverse_times(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(A + alpha I)^-1 B; with alpha = 0 the smallest solution, where features that repeat each other share theirs."""
    if alpha > 0:
        ridge = a + alpha * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        root, failed = torch.linalg.cholesky_ex(ridge)
        if not failed.any():
            return torch.cholesky_solve(b, root)
        # a penalty below the rounding errors of A, whose limit is that of no penalty
    solution: Tensor = torch.linalg.pinv(a, hermitian=True, rtol=1e-11) @ b
    return solution
