r"""Affinity graphs of a batch's features: who votes for whom, and how the votes are summed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import at_least_float32, integer, one_of

__all__ = ["Neighbours", "affinity"]

KINDS = ("knn", "rbf", "linear")
MIN_SIGMA = 1e-6  # rbf width when every sample has k copies: coincident pairs get 1, all others 0
BLOCK = 1024  # rows of distances held at a time in the search for neighbours


class Neighbours(NamedTuple):
    """A sparse W: row i holds ``weight[i, m]`` in column ``index[i, m]``.

    Attributes:
        index: columns, ``(..., N, k)``.
        weight: entries, ``(..., N, k)``.
    """

    index: Tensor  # type: ignore[assignment] # hides the method of tuples
    weight: Tensor

    def dense(self) -> Tensor:
        """The same W as an ``(..., N, N)`` matrix."""
        empty = self.weight.new_zeros(*self.index.shape[:-1], self.index.shape[-2])
        return empty.scatter_add(-1, self.index, self.weight)


def affinity(
    features: Tensor, kind: str = "knn", k: int = 5, *, symmetric: bool = False, normalise: bool = True
) -> Neighbours | Tensor:
    r"""Affinity W of features, ``(..., N, d) -> (..., N, N)``: 1 for the k nearest others, or exp(-D^2 / 2 sigma^2).

    The kinds (eq-lame-affinity): ``"knn"``, as :class:`Neighbours`: 1 for the k nearest *other* samples of each row,
    else 0. ``"rbf"``: :math:`\exp(-D^2/2\sigma^2)` with :math:`\sigma` the mean over rows of the k-th smallest
    distance, self included. ``"linear"``: :math:`\phi_i^\top\phi_j`; where negative, samples repel. A row with a
    non-finite entry is linked to nothing. Distances are computed in float64, so that near-duplicates have neighbours.

    Args:
        features: a batch, or streams of them along leading dimensions.
        kind: as above (official default: rbf; here knn, which is sparse and whose votes count in whole nats).
        k: neighbours (5: official configuration).
        symmetric: :math:`(W+W^\top)/2`, always dense (official option, off).
        normalise: scale each row to length 1 first, as in the paper.

    >>> affinity(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), k=1).index.mT
    tensor([[1, 0, 1]])
    """
    check_graph(kind, k)
    phi = check_matrix("features", features)
    linked = phi.isfinite().all(-1)  # (..., N)
    phi = phi.masked_fill(~linked[..., None], 0.0)
    linked = linked & (linked.sum(-1, keepdim=True) > 1)  # a lone sample keeps its q: no vote for itself
    dtype = phi.dtype
    if kind != "linear":
        phi = _wide(phi)
    if normalise:
        phi = F.normalize(phi, dim=-1)  # a zero vector stays zero
    if kind == "knn":
        near = _nearest(_centred(phi, linked), linked, k, dtype)
        if not symmetric:
            return near
        w = near.dense()
    else:
        pairs = linked[..., :, None] & linked[..., None, :]
        w = _product(phi, phi.mT) if kind == "linear" else _rbf(_centred(phi, linked), pairs, k)
        w = w.to(dtype).masked_fill(~pairs, 0.0)
    return (w + w.mT) / 2 if symmetric else w


def votes(w: Neighbours | Tensor, z: Tensor) -> Tensor:
    """The products W Z. Neighbours are summed by one fused gather: N k K operations, and no N x k x K array."""
    if not isinstance(w, Neighbours):
        return _product(w.to(z), z)
    n, k = w.index.shape[-2:]
    if k == 0:
        return torch.zeros_like(z)
    first = torch.arange(0, z.shape[:-1].numel(), n, device=z.device)  # row 0 of each stream
    index = w.index + first.view(*z.shape[:-2], 1, 1)
    weight = w.weight.to(z).reshape(-1, k)
    summed = F.embedding_bag(index.reshape(-1, k), z.flatten(0, -2), mode="sum", per_sample_weights=weight)
    return summed.view_as(z)


def check_matrix(name: str, t: Tensor) -> Tensor:
    """``t`` in float32 or wider, once it is known to be a batch ``(..., N, at least 1)``."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.ndim < 2 or t.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., N, at least 1), got {tuple(t.shape)}")
    return at_least_float32(t)


def check_graph(kind: str, k: int) -> None:
    """Refuse an unknown kind of graph, or fewer than one neighbour."""
    one_of("kind", kind, KINDS)
    integer("k", k, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(b.device.type, enabled=False):  # distances in bfloat16 lose the neighbours
        return a @ b


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a|^2 + |b|^2 - 2 a.b, never N x N x d; what the rounding of that sum would drown counts as 0."""
    scale = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    d2 = scale - 2 * _product(a, b.mT)
    return d2.masked_fill(d2 <= 16 * torch.finfo(a.dtype).eps * scale, 0.0)


def _wide(phi: Tensor) -> Tensor:
    """In double precision, where there is one: the frames of two films have no common mean that could be subtracted."""
    return phi if phi.device.type == "mps" else phi.double()


def _centred(phi: Tensor, linked: Tensor) -> Tensor:
    """Rows about their mean, at the same distances: near-duplicates would cancel in |a|^2 + |b|^2 - 2 a.b."""
    mean = (phi * linked[..., None]).sum(-2, keepdim=True) / linked.sum(-1)[..., None, None].clamp_min(1)
    return (phi - mean).masked_fill(~linked[..., None], 0.0)


def _nearest(phi: Tensor, linked: Tensor, k: int, dtype: torch.dtype) -> Neighbours:
    # eq-lame-affinity, knn: in blocks of rows, so memory is BLOCK x N
    others = torch.arange(phi.shape[-2], device=phi.device)
    found = []
    for i in others.split(BLOCK):
        allowed = linked[..., i, None] & linked[..., None, :] & (i[:, None] != others)
        d2 = _squared_distances(phi[..., i, :], phi).masked_fill(~allowed, math.inf)
        found.append(d2.topk(max(min(k, len(others) - 1), 0), dim=-1, largest=False))
    distance, index = (torch.cat(t, -2) for t in zip(*found, strict=True))
    return Neighbours(index, distance.isfinite().to(dtype))  # weight 0 where there are fewer than k to link


def _rbf(phi: Tensor, pairs: Tensor, k: int) -> Tensor:
    d2 = _squared_distances(phi, phi)
    d2.diagonal(dim1=-2, dim2=-1).zero_()
    smallest = d2.masked_fill(~pairs, math.inf).topk(min(k, phi.shape[-2]), dim=-1, largest=False).values.sqrt()
    kth = F.pad(smallest.masked_fill(smallest.isinf(), 0.0), (1, 0)).amax(-1)  # fewer than k linked, or none: the last
    sigma = (kth.sum(-1) / pairs.any(-1).sum(-1).clamp_min(1)).clamp_min(MIN_SIGMA)
    # eq-lame-affinity, rbf:  w_ij = exp(-D_ij^2 / 2 sigma^2)
    return (-d2 / (2 * sigma[..., None, None] ** 2)).exp()
