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
>>> from peftref.tta import affinity
>>> q = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])  # the third sample is unsure ...
>>> w = affinity(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]]), k=2)  # ... and looks like the two others
>>> laplacian_assign(q.log(), w).z.argmax(-1)
tensor([0, 0, 0])
>>> laplacian_assign(q.log(), w, strength=0.0).z[2]  # no votes: q itself
tensor([0.4000, 0.6000])
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, integer, number
from .._taps import has_head, tapped
from .._wrapped import plain_name
from .core.adapted import Adapted
from .core.graphs import Neighbours, affinity, check_graph, check_matrix, votes

__all__ = ["Assignment", "LAME", "energy", "laplacian_assign", "vote_update"]


class Assignment(NamedTuple):
    """Result of :func:`laplacian_assign`.

    Attributes:
        z: assignments, ``(..., N, K)``.
        log_z: their logarithms, ``(..., N, K)``, exact where z underflows.
        energies: the monitored E_n, ``(..., T)``; a stream that has stopped repeats its last value.
        iterations: number of updates, ``(...)``.
    """

    z: Tensor
    log_z: Tensor
    energies: Tensor
    iterations: Tensor


def vote_update(log_q: Tensor, affinity: Neighbours | Tensor, z: Tensor, strength: float = 1.0) -> Tensor:
    """Logits of the next assignments: a_i = log q_i + lambda (W Z)_i, so that z_i <- softmax(a_i).

    Args:
        log_q: log-probabilities of the network, ``(..., N, K)``.
        affinity: W, of :func:`peftref.tta.affinity`, or ``(..., N, N)``.
        z: present assignments, ``(..., N, K)``.
        strength: lambda, the nats that a class gains for each neighbour that agrees on it.
    """
    # eq-lame-update:  a_i = log q_i + lambda (W Z)_i
    return torch.add(log_q, votes(affinity, z), alpha=strength)


def laplacian_assign(
    log_probs: Tensor,
    affinity: Neighbours | Tensor,
    strength: float = 1.0,
    *,
    floor: float = 0.0,
    max_iterations: int = 100,
    tolerance: float = 1e-8,
) -> Assignment:
    r"""Iterate z_i <- softmax(log q_i + lambda (W Z)_i) from Z = Q until the monitored value (eq-lame-monitor) rests.

    E falls at each step if W is symmetric positive semi-definite (rbf, linear); on the raw knn graph, which is neither,
    it usually converges.

    Args:
        log_probs: log q; -inf is allowed. A row that is no distribution (a NaN, +inf, all -inf) starts uniform.
        affinity: of :func:`peftref.tta.affinity`, or any dense ``(..., N, N)`` or sparse ``(N, N)`` tensor.
        strength: :math:`\lambda` (1: paper), the nats a class gains for each neighbour that agrees on it.
        floor: use log(q + floor) for log q (official code: 1e-10).
        max_iterations: at most this many (100: official code).
        tolerance: relative change of E at which to stop, after three iterations or more (1e-8: official code).

    Shape:
        ``(..., N, K), (..., N, N) -> (..., N, K)``; leading dimensions are streams, each of which stops by itself.
    """
    log_q = check_matrix("log_probs", log_probs)
    integer("max_iterations", max_iterations, 1)
    number("strength", strength, 0)
    number("floor", floor, 0)
    number("tolerance", tolerance, 0)
    _check_fits(affinity, log_q)
    if floor:
        log_q = torch.logaddexp(log_q, log_q.new_tensor(math.log(floor)))
    log_q = torch.where(log_q.logsumexp(-1, keepdim=True).isfinite(), log_q, -math.log(log_q.shape[-1]))

    a = log_q
    z = log_q.softmax(-1)
    monitor = _Monitor(log_q, tolerance)
    for _ in range(max_iterations):
        update = vote_update(log_q, affinity, z, strength)
        a = monitor.freeze(a, update)
        z = a.softmax(-1)
        if monitor.all_stopped(a, z):
            break
    return Assignment(z, a.log_softmax(-1), monitor.values(), monitor.iterations)


def energy(z: Tensor, log_probs: Tensor, affinity: Neighbours | Tensor, strength: float = 1.0) -> Tensor:
    """The objective of each batch, E = sum_i KL(z_i || q_i) - lambda/2 sum_ij w_ij z_i.z_j; 0 log 0 counts as 0.

    Args:
        z: assignments, ``(..., N, K)``.
        log_probs: log q, ``(..., N, K)``.
        affinity: W, as for :func:`laplacian_assign`.
        strength: lambda.

    Returns:
        ``(...)``.
    """
    z = at_least_float32(z)
    log_q = at_least_float32(log_probs)
    # eq-lame-objective:  E = sum_i KL(z_i || q_i) - lambda/2 sum_ij w_ij z_i.z_j
    kl = torch.where(z > 0, z * (z.log() - log_q), 0.0).sum((-2, -1))
    return kl - strength / 2 * (z * votes(affinity, z)).sum((-2, -1))


class LAME(Adapted):
    """Corrects the outputs of each batch by its neighbours' votes, z_i <- softmax(log q_i + lambda sum_j w_ij z_j).

    ``forward(x)`` returns the log-assignments of a batch, usable as logits; nothing carries over to the next one. The
    network keeps its source statistics: by its own, a batch of one class loses the features its samples share.

    Args:
        model: any classifier; copied, never changed. One backbone pass yields logits and features.
        kind: of the graph, "knn", "rbf" (official default) or "linear", see :func:`peftref.tta.affinity`.
        k: neighbours (5: official configuration).
        strength: lambda, the nats that a class gains for each neighbour that agrees on it (1: paper).
        symmetric: make W symmetric (official option, off).
        max_iterations: at most this many updates (100: official code).
        head: name of the final layer, whose input are the features (``"fc"`` in torchvision's ResNets). Not needed for
            a model whose ``forward`` calls timm's ``forward_head``.

    Raises:
        TypeError: a model that returns no tensor.
        ValueError: bad settings, no such layer, or neither ``head`` nor timm's methods; in use, a head that the model's
            ``forward`` does not call, or a model that returns other than logits ``(N, K)``.

    Shape:
        ``x``: ``(N, ...)``; returns ``(N, K)``, in float32 for a half-precision model.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "knn",
        k: int = 5,
        strength: float = 1.0,
        *,
        symmetric: bool = False,
        max_iterations: int = 100,
        head: str | None = None,
    ) -> None:
        super().__init__(model)
        check_graph(kind, k)
        self.head = plain_name(model, head) if isinstance(head, str) else head
        layers = dict(self.source.named_modules())
        if not (has_head(self.source) if self.head is None else self.head in layers):
            raise ValueError(f"head: expected a layer of the model, as it lacks forward_features/_head; got {head!r}")
        self.kind = kind
        self.k = k
        self.strength = number("strength", strength, 0)
        self.symmetric = symmetric
        self.max_iterations = integer("max_iterations", max_iterations, 1)

    def reset(self) -> None:
        """Nothing to undo: no batch leaves a trace."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if len(x) == 0:
            return self.empty(self.source, x)
        with tapped(self.source, self.head) as features_of:
            logits = self.logits(self.source, x)
        features = features_of(len(x))
        log_q = at_least_float32(logits).log_softmax(-1)
        # A broken image must neither vote nor receive votes: affinity() leaves rows with a NaN unlinked.
        features = features.flatten(1).masked_fill(log_q.isnan().any(-1, keepdim=True), math.nan)
        w = affinity(features, self.kind, self.k, symmetric=self.symmetric)
        return laplacian_assign(log_q, w, self.strength, max_iterations=self.max_iterations).log_z


class _Monitor:
    """Which streams have stopped, because E_n changed by less than ``tolerance`` of its value; each for itself."""

    def __init__(self, log_q: Tensor, tolerance: float) -> None:
        self.tolerance = tolerance
        self.every = _every(log_q.device)
        self.stopped = torch.zeros(log_q.shape[:-2], dtype=torch.bool, device=log_q.device)
        self.iterations = torch.zeros_like(self.stopped, dtype=torch.long)
        self.last = log_q[..., 0]
        self.energies: list[Tensor] = []

    def freeze(self, a: Tensor, update: Tensor) -> Tensor:
        """A stream that has stopped keeps its a, and with it z and E; the others take the update."""
        if self.every == 1 and not self.stopped.any():
            return update
        return torch.where(self.stopped[..., None, None], a, update)

    def all_stopped(self, a: Tensor, z: Tensor) -> bool:
        """Note E_n; on an accelerator the answer is looked at only now and then."""
        n = len(self.energies)
        # eq-lame-monitor:  E_n = -sum_i log sum_k exp(a_ik), where log-sum-exp(a) = max a - log max softmax(a)
        lse = a.amax(-1) - z.amax(-1).log()  # (..., N)
        self.energies.append(-lse.sum(-1))
        self.iterations = self.iterations + ~self.stopped
        if n > 1:  # sum the differences: in float32 the difference of the sums would hide a change of 1e-8
            change = (lse - self.last).sum(-1).abs()
            self.stopped = self.stopped | (change <= self.tolerance * self.last.sum(-1).abs())
        self.last = lse
        return n > 1 and n % self.every == self.every - 1 and bool(self.stopped.all())

    def values(self) -> Tensor:
        """E_n of every iteration of the stream that stopped last."""
        return torch.stack(self.energies, -1)[..., : max(self.iterations.flatten().tolist(), default=0)]


def _every(device: torch.device) -> int:
    """Iterations between looks at whether all have stopped: a look stalls the queue of an accelerator."""
    return 1 if device.type == "cpu" else 5


def _check_fits(affinity: Neighbours | Tensor, log_q: Tensor) -> None:
    if isinstance(affinity, Neighbours):
        got = affinity.index.shape[:-1]
        expected = log_q.shape[:-1]
    else:
        got = affinity.shape[-2:]
        expected = 2 * log_q.shape[-2:-1]
    if got != expected:
        raise ValueError(f"affinity: expected {tuple(expected)}, for the rows of log_probs, got {tuple(got)}")
