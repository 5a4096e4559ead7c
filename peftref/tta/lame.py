r"""LAME (Laplacian-adjusted maximum-likelihood estimation) corrects the outputs of one batch, never the weights.

Boudiaf, Mueller, Ben Ayed, Bertinetto, "Parameter-free Online Test-time Adaptation", CVPR 2022, arXiv 2201.05718.

A frozen classifier gives sample i class probabilities :math:`q_i` and features :math:`\phi_i`. Wanted are assignments
:math:`z_i` close to :math:`q_i`, and alike where the affinity :math:`w_{ij}` of features is large (eq-lame-objective):

.. math:: E(Z)=\sum_i\mathrm{KL}(z_i\|q_i)-\frac\lambda2\sum_{i,j}w_{ij}\,z_i^\top z_j .

For symmetric positive semi-definite W the second term is concave, so it lies below its tangent at the current
:math:`Z^{(n)}`. Up to a constant that bounds E by (eq-lame-majoriser)

.. math:: M_n(Z)=\sum_i\mathrm{KL}(z_i\|q_i)-\lambda\,\mathrm{tr}(Z^\top WZ^{(n)}),

which separates over samples. Its minimiser (eq-lame-update), and its minimum, which tells when to stop (but, lacking
that constant, may rise while E falls; eq-lame-monitor), are

.. math:: z_i^{(n+1)}=\mathrm{softmax}(a_i),\quad a_i=\log q_i+\lambda(WZ^{(n)})_i,\quad Z^{(0)}=Q,
          \qquad E_n=-\sum_i\log\sum_k e^{a_{ik}} .

=================  =====================  ======================  ================
argument           here                   paper                   shape
=================  =====================  ======================  ================
``features``       :math:`\phi`           same                    ``(..., N, d)``
``log_probs``      :math:`\log q`         :math:`\log q`          ``(..., N, K)``
``affinity``       :math:`W`              :math:`w(x_i,x_j)`      ``(..., N, N)``
``strength``       :math:`\lambda`        1                       scalar
``z``              :math:`z`              :math:`\tilde z`        ``(..., N, K)``
=================  =====================  ======================  ================

Differs from the official code: a lone sample keeps q (there: NaN, or a vote for itself); the rbf width is at least
1e-6; no sample is its own neighbour, even among duplicates; a row with a NaN is left out instead of spoiling the batch;
log q comes from the logits, without a floor (an option here); the monitor counts :math:`\lambda` once, not twice.

>>> import torch
>>> q = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])  # the third sample is unsure ...
>>> w = affinity(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]]), k=2)  # ... and looks like the two others
>>> laplacian_assign(q.log(), w).z.argmax(-1)
tensor([0, 0, 0])
>>> laplacian_assign(q.log(), w, strength=0.0).z[2]  # no votes: q itself
tensor([0.4000, 0.6000])
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.adapted import Adapted, at_least_float32, check_positive

__all__ = ["Assignment", "LAME", "Neighbours", "affinity", "energy", "laplacian_assign"]

KINDS = ("knn", "rbf", "linear")
MIN_SIGMA = 1e-6  # rbf width when every sample has k copies: coincident pairs get 1, all others 0
BLOCK = 1024  # rows of distances held at a time in the search for neighbours
LOOK = {"cpu": 1}  # iterations between looks at whether all have stopped; 5 elsewhere, where a look stalls the queue


class Neighbours(NamedTuple):
    """A sparse W: row i holds ``weight[i, m]`` in column ``index[i, m]``; both ``(..., N, k)``."""

    index: Tensor  # type: ignore[assignment] # hides the method of tuples
    weight: Tensor

    def dense(self) -> Tensor:
        """The same W as an ``(..., N, N)`` matrix."""
        empty = self.weight.new_zeros(*self.index.shape[:-1], self.index.shape[-2])
        return empty.scatter_add(-1, self.index, self.weight)


class Assignment(NamedTuple):
    """Result of :func:`laplacian_assign`."""

    z: Tensor  # (..., N, K)
    log_z: Tensor  # (..., N, K), exact where z underflows
    energies: Tensor  # (..., T), the monitored E_n; a stream that has stopped repeats its last value
    iterations: Tensor  # (...)


def affinity(
    features: Tensor, kind: str = "knn", k: int = 5, *, symmetric: bool = False, normalise: bool = True
) -> Neighbours | Tensor:
    r"""Affinity W of features (eq-lame-affinity), ``(..., N, d) -> (..., N, N)``; for knn as :class:`Neighbours`.

    ``"knn"``: 1 for the k nearest *other* samples of each row, else 0. ``"rbf"``: :math:`\exp(-D^2/2\sigma^2)` with
    :math:`\sigma` the mean over rows of the k-th smallest distance, self included. ``"linear"``:
    :math:`\phi_i^\top\phi_j`; where negative, samples repel. A row with a non-finite entry is linked to nothing.

    Args:
        features: a batch, or streams of them along leading dimensions; half precision is computed in float32.
        kind: as above (official default: rbf; here knn, which is sparse and whose votes count in whole nats).
        k: neighbours (5: official configuration).
        symmetric: :math:`(W+W^\top)/2`, always dense (official option, off).
        normalise: scale each row to length 1 first, as in the paper.

    >>> affinity(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), k=1).index.mT
    tensor([[1, 0, 1]])
    """
    _check(kind=kind, k=k)
    phi = _matrix("features", features)
    linked = phi.isfinite().all(-1)  # (..., N)
    phi = phi.masked_fill(~linked[..., None], 0.0)
    linked = linked & (linked.sum(-1, keepdim=True) > 1)  # a lone sample keeps its q: no vote for itself
    phi = F.normalize(phi, dim=-1) if normalise else phi  # a zero vector stays zero
    if kind == "knn":
        near = _nearest(phi, linked, k)
        if not symmetric:
            return near
        w = near.dense()
    else:
        pairs = linked[..., :, None] & linked[..., None, :]
        w = (_product(phi, phi.mT) if kind == "linear" else _rbf(phi, pairs, k)).masked_fill(~pairs, 0.0)
    return (w + w.mT) / 2 if symmetric else w


def energy(z: Tensor, log_probs: Tensor, affinity: Neighbours | Tensor, strength: float = 1.0) -> Tensor:
    """The objective E(Z) of each batch, ``(..., N, K) -> (...)``; 0 log 0 counts as 0."""
    z, log_q = at_least_float32(z), at_least_float32(log_probs)
    # eq-lame-objective:  E = sum_i KL(z_i || q_i) - lambda/2 sum_ij w_ij z_i.z_j
    kl = torch.where(z > 0, z * (z.log() - log_q), 0.0).sum((-2, -1))
    return kl - strength / 2 * (z * _votes(affinity, z)).sum((-2, -1))


def laplacian_assign(
    log_probs: Tensor, affinity: Neighbours | Tensor, strength: float = 1.0, *, floor: float = 0.0,
    max_iterations: int = 100, tolerance: float = 1e-8,
) -> Assignment:  # fmt: skip
    r"""Iterate eq-lame-update from Z = Q until the monitored value (eq-lame-monitor) rests.

    E falls at each step if W is symmetric positive semi-definite (rbf, linear); on the raw knn graph, which is neither,
    it usually converges.

    Args:
        log_probs: log q; -inf is allowed. A row that is no distribution (a NaN, +inf, all -inf) starts uniform.
        affinity: of :func:`affinity`, or any dense ``(..., N, N)`` or sparse ``(N, N)`` tensor.
        strength: :math:`\lambda` (1: paper), the nats a class gains for each neighbour that agrees on it.
        floor: use log(q + floor) for log q (official code: 1e-10).
        max_iterations: at most this many (100: official code).
        tolerance: relative change of E at which to stop, after three iterations or more (1e-8: official code).

    Shape:
        ``(..., N, K), (..., N, N) -> (..., N, K)``; leading dimensions are streams, each of which stops by itself.
    """
    log_q = _matrix("log_probs", log_probs)
    _check(max_iterations=max_iterations)
    for name, value in (("strength", strength), ("floor", floor), ("tolerance", tolerance)):
        check_positive(name, value)
    got = affinity.index.shape[:-1] if isinstance(affinity, Neighbours) else affinity.shape[-2:]
    expected = log_q.shape[:-1] if isinstance(affinity, Neighbours) else 2 * log_q.shape[-2:-1]
    if got != expected:
        raise ValueError(f"affinity: expected {tuple(expected)}, for the rows of log_probs, got {tuple(got)}")
    log_q = torch.logaddexp(log_q, log_q.new_tensor(math.log(floor))) if floor else log_q
    log_q = torch.where(log_q.logsumexp(-1, keepdim=True).isfinite(), log_q, -math.log(log_q.shape[-1]))

    a, z, last, energies = log_q, log_q.softmax(-1), log_q[..., 0], []
    done = torch.zeros(log_q.shape[:-2], dtype=torch.bool, device=log_q.device)
    iterations = torch.zeros_like(done, dtype=torch.long)
    every = LOOK.get(log_q.device.type, 5)
    for n in range(max_iterations):
        # eq-lame-update:  z_i <- softmax(log q_i + lambda (W Z)_i)
        update = torch.add(log_q, _votes(affinity, z), alpha=strength)
        # A stream that has stopped keeps its a, and with it z and E: company never changes a result.
        a = torch.where(done[..., None, None], a, update) if every > 1 or done.any() else update
        z = a.softmax(-1)
        # eq-lame-monitor:  E_n = -sum_i log sum_k exp(a_ik), where log-sum-exp(a) = max a - log max softmax(a)
        lse = a.amax(-1) - z.amax(-1).log()  # (..., N)
        energies.append(-lse.sum(-1))
        iterations = iterations + ~done
        if n > 1:  # sum the differences: in float32 the difference of the sums would hide a change of 1e-8
            done = done | ((lse - last).sum(-1).abs() <= tolerance * last.sum(-1).abs())
            if n % every == every - 1 and done.all():
                break
        last = lse
    monitored = torch.stack(energies, -1)[..., : max(iterations.flatten().tolist(), default=0)]
    return Assignment(z, a.log_softmax(-1), monitored, iterations)


class LAME(Adapted):
    """``forward(x)`` returns the log-assignments of a batch, usable as logits; nothing carries over to the next one.

    The network keeps its source statistics: by its own, a batch of one class loses the features its samples share.

    Args:
        model: any classifier; copied, never changed. One backbone pass yields logits and features.
        kind, k, symmetric: see :func:`affinity`.
        strength, max_iterations: see :func:`laplacian_assign`.
        head: name of the final layer, whose input are the features (``"fc"`` in torchvision's ResNets). Not needed for
            a model that has timm's ``forward_features`` and ``forward_head``.

    Raises:
        ValueError: bad settings, no such layer, or neither ``head`` nor timm's methods.

    Shape:
        ``x``: ``(N, ...)``; returns ``(N, K)``, in float32 for a half-precision model.
    """

    def __init__(
        self, model: nn.Module, kind: str = "knn", k: int = 5, strength: float = 1.0, *, symmetric: bool = False,
        max_iterations: int = 100, head: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model)
        _check(kind=kind, k=k, max_iterations=max_iterations)
        check_positive("strength", strength)
        timm_like = hasattr(model, "forward_features") and hasattr(model, "forward_head")
        if not (timm_like if head is None else head in dict(model.named_modules())):
            raise ValueError(f"head: expected a layer of the model, as it lacks forward_features/_head; got {head!r}")
        self.kind, self.k, self.strength, self.symmetric = kind, k, strength, symmetric
        self.max_iterations, self.head = max_iterations, head

    def reset(self) -> None:
        """Nothing to undo: no batch leaves a trace."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if len(x) == 0:
            return self.empty(self.source, x)
        logits, features = self._predict(x)
        log_q = at_least_float32(logits).log_softmax(-1)
        # A broken image must neither vote nor receive votes: affinity() leaves rows with a NaN unlinked.
        features = features.flatten(1).masked_fill(log_q.isnan().any(-1, keepdim=True), math.nan)
        w = affinity(features, self.kind, self.k, symmetric=self.symmetric)
        return laplacian_assign(log_q, w, self.strength, max_iterations=self.max_iterations).log_z

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.head is None:
            timm: Any = self.source  # it has methods of which nn.Module says nothing
            h = timm.forward_features(x)
            return timm.forward_head(h), timm.forward_head(h, pre_logits=True)
        seen: list[Tensor] = []
        hook = self.source.get_submodule(self.head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            return self.source(x), seen[-1]
        finally:
            hook.remove()


def _product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(b.device.type, enabled=False):  # distances in bfloat16 lose the neighbours
        return a @ b


def _votes(w: Neighbours | Tensor, z: Tensor) -> Tensor:
    """W Z. Neighbours are summed by one fused gather: N k K operations instead of N^2 K, and no N x k x K."""
    if not isinstance(w, Neighbours):
        return _product(w.to(z), z)
    n, k = w.index.shape[-2:]
    if k == 0:
        return torch.zeros_like(z)
    first = torch.arange(0, z.shape[:-1].numel(), n, device=z.device).view(*z.shape[:-2], 1, 1)  # row 0 of each stream
    index, weight = (w.index + first).reshape(-1, k), w.weight.to(z).reshape(-1, k)
    return F.embedding_bag(index, z.flatten(0, -2), mode="sum", per_sample_weights=weight).view_as(z)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a|^2 + |b|^2 - 2 a.b, never N x N x d; what the rounding of that sum would drown counts as 0."""
    scale = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    d2 = scale - 2 * _product(a, b.mT)
    return d2.masked_fill(d2 <= 16 * torch.finfo(a.dtype).eps * scale, 0.0)


def _nearest(phi: Tensor, linked: Tensor, k: int) -> Neighbours:
    # eq-lame-affinity, knn: in blocks of rows, so memory is BLOCK x N
    others, found = torch.arange(phi.shape[-2], device=phi.device), []
    for i in others.split(BLOCK):
        allowed = linked[..., i, None] & linked[..., None, :] & (i[:, None] != others)
        d2 = _squared_distances(phi[..., i, :], phi).masked_fill(~allowed, math.inf)
        found.append(d2.topk(max(min(k, len(others) - 1), 0), dim=-1, largest=False))
    distance, index = (torch.cat(t, -2) for t in zip(*found, strict=True))
    return Neighbours(index, distance.isfinite().to(phi.dtype))  # weight 0 where there are fewer than k to link


def _rbf(phi: Tensor, pairs: Tensor, k: int) -> Tensor:
    # eq-lame-affinity, rbf:  w_ij = exp(-D_ij^2 / 2 sigma^2)
    d2 = _squared_distances(phi, phi)
    d2.diagonal(dim1=-2, dim2=-1).zero_()
    smallest = d2.masked_fill(~pairs, math.inf).topk(min(k, phi.shape[-2]), dim=-1, largest=False).values.sqrt()
    kth = F.pad(smallest.masked_fill(smallest.isinf(), 0.0), (1, 0)).amax(-1)  # fewer than k linked, or none: the last
    sigma = (kth.sum(-1) / pairs.any(-1).sum(-1).clamp_min(1)).clamp_min(MIN_SIGMA)
    return (-d2 / (2 * sigma[..., None, None] ** 2)).exp()


def _matrix(name: str, t: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.ndim < 2 or t.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., N, at least 1), got {tuple(t.shape)}")
    return at_least_float32(t)


def _check(kind: str = "knn", **counts: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
