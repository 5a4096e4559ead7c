r"""Cross-fitting in a panel: which rows are predicted together, and which rows the prediction learns from.

==============  ===========================================  =====================================================
scheme          a fold holds                                 left out of its training besides
==============  ===========================================  =====================================================
``random``      rows at random                               nothing
``unit``        all rows of some units                       nothing
``period``      all rows of some periods, at random          nothing
``time_block``  all rows of adjacent periods                 nothing
``nlo``         the same ("neighbours left out")             the blocks before and after
``product``     some units in some periods: K x K folds      every row of these units, every row of these periods
==============  ===========================================  =====================================================

The first five are Table 2 of Fuhr and Papies (2024); ``product`` serves two-way clustered inference (Chiang, Kato, Ma
and Sasaki, 2022). All are one object: the fold of each row, and the table ``keep[k, j]`` of whether the rows of fold j
train the model for fold k.

>>> layout = Layout.of([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])
>>> make_folds(layout, 3, "unit", seed=1).fold  # one row, for one split
tensor([[2, 2, 0, 0, 1, 1]])
>>> make_folds(layout, 2, "time_block").keep
tensor([[False,  True],
        [ True, False]])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ..._checks import integer
from .layout import Layout

__all__ = ["SCHEMES", "Folds", "check_shapes", "make_folds"]

SCHEMES = ("random", "unit", "period", "time_block", "nlo", "product")


@dataclass(frozen=True, eq=False)
class Folds:
    """How rows are split, R times over.

    Attributes:
        fold: fold of each row, ``(R, n)``.
        keep: ``(K, K)``; whether the rows of fold j train the model that predicts fold k.
        scheme: name of the scheme.

    Raises:
        ValueError: other shapes or types, or fold numbers that ``keep`` has no row for.
    """

    fold: Tensor
    keep: Tensor
    scheme: str = "custom"

    def __post_init__(self) -> None:
        fold = self.fold
        keep = self.keep
        if fold.ndim != 2 or fold.dtype != torch.long:
            raise ValueError(f"fold: expected int64 of shape (R, n), got {fold.dtype} of shape {tuple(fold.shape)}")
        if keep.ndim != 2 or keep.shape[0] != keep.shape[1] or keep.dtype != torch.bool:
            raise ValueError(f"keep: expected bool of shape (K, K), got {keep.dtype} of shape {tuple(keep.shape)}")
        if fold.numel() and not 0 <= int(fold.min()) <= int(fold.max()) < len(keep):
            raise ValueError(f"fold: expected 0 to {len(keep) - 1}, got {int(fold.min())} to {int(fold.max())}")

    def __len__(self) -> int:
        return len(self.keep)

    def splits(self, repeat: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions of the training and of the test rows of each fold."""
        fold = self.fold[repeat]
        for k in range(len(self)):
            yield self.keep[k][fold].nonzero().squeeze(1), (fold == k).nonzero().squeeze(1)

    def select(self, rows: Tensor) -> Folds:
        """The same split of some rows, given by their positions or a mask."""
        return Folds(self.fold[:, rows], self.keep, self.scheme)

    def to(self, device: torch.device | str) -> Folds:
        """The same on a device."""
        return Folds(self.fold.to(device), self.keep.to(device), self.scheme)


def make_folds(layout: Layout, folds: int = 5, scheme: str = "unit", *, repeats: int = 1, seed: int = 0) -> Folds:
    """Split the rows of a panel.

    Args:
        layout: of the rows.
        folds: K >= 2; ``nlo`` needs 4 or more (the paper takes at least 10), ``product`` makes K x K.
        scheme: of the table above.
        repeats: R independent splits; those of ``time_block`` and ``nlo`` are all the same.
        seed: of the random schemes.

    Raises:
        ValueError: an unknown scheme, too few folds, or more folds than there are rows, units or periods to share.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    least = 4 if scheme == "nlo" else 2
    if not isinstance(folds, Integral) or folds < least:
        raise ValueError(f"folds: expected an integer >= {least} for the scheme {scheme!r}, got {folds!r}")
    integer("repeats", repeats, 1)
    integer("seed", seed, 0)
    shared = {"random": {"rows": len(layout)}, "unit": {"units": layout.n_units}}
    shared |= {"product": {"units": layout.n_units, "periods": layout.n_periods}}
    for what, size in shared.get(scheme, {"periods": layout.n_periods}).items():
        if size < folds:
            raise ValueError(f"folds: expected no more than the {size} {what} that {scheme!r} shares out, got {folds}")
    rng = np.random.default_rng((seed, 1))  # a stream of its own: not that of data simulated with the same seed

    def deal(size: int) -> Tensor:
        """``(R, size)``: K shares as equal as can be, at random."""
        dealt = np.tile(np.arange(size) % folds, (repeats, 1))
        return torch.from_numpy(rng.permuted(dealt, axis=1))

    apart = ~torch.eye(folds, dtype=torch.bool)
    units = layout.unit.cpu()
    periods = layout.time.cpu()
    if scheme == "random":
        fold = deal(len(layout))
        keep = apart
    elif scheme == "unit":
        fold = deal(layout.n_units)[:, units]
        keep = apart
    elif scheme == "period":
        fold = deal(layout.n_periods)[:, periods]
        keep = apart
    elif scheme == "product":
        fold = deal(layout.n_units)[:, units] * folds + deal(layout.n_periods)[:, periods]
        keep = (apart[:, None, :, None] & apart[None, :, None, :]).reshape(folds**2, folds**2)
    else:
        block = torch.arange(layout.n_periods) * folds // layout.n_periods
        fold = block[periods].expand(repeats, -1)
        apart_by = (torch.arange(folds)[:, None] - torch.arange(folds)).abs()
        keep = apart_by > (1 if scheme == "nlo" else 0)
    _no_empty_fold(fold, keep, scheme)
    return Folds(fold, keep, scheme).to(layout.unit.device)


def _no_empty_fold(fold: Tensor, keep: Tensor, scheme: str) -> None:
    sizes = torch.stack([row.bincount(minlength=len(keep)) for row in fold])
    if not (sizes > 0).all():
        raise ValueError(f"folds: expected rows in each fold, but the scheme {scheme!r} leaves some empty; take fewer")
    if not (sizes.double() @ keep.double().T > 0).all():
        raise ValueError(f"folds: expected training rows for each fold, but {scheme!r} leaves none; take more folds")


def check_shapes(
    z: Tensor, targets: Tensor, folds: Folds, uses: Sequence[Sequence[int]] | None, unit: Tensor | None, linear: int
) -> set[int]:
    """The size of the batch, if not 1."""
    shapes = [tuple(t.shape) for t in (z, targets, folds.fold)]
    sizes = {len(t) for t in (z, targets, folds.fold)} - {1}
    if z.ndim != 3 or targets.ndim != 3 or 0 in sizes or len(sizes) > 1 or len({shape[-1] for shape in shapes}) > 1:
        raise ValueError(f"z, targets, folds: expected (B or 1, J, n), (B or 1, q, n) and (B or 1, n), got {shapes}")
    _, j, n = z.shape
    if not 0 <= linear <= j:
        raise ValueError(f"linear: expected 0 to {j} variables, got {linear}")
    if unit is not None and unit.shape != (n,):
        raise ValueError(f"unit: expected codes of shape ({n},), got {tuple(unit.shape)}")
    q = targets.shape[1]
    if uses is not None and (len(uses) != q or not all(0 <= i < j for used in uses for i in used)):
        raise ValueError(f"uses: expected {q} sequences of numbers from 0 to {j - 1}, got {uses}")
    return sizes
