r"""Reservoir buffer: a uniform sample, of fixed size, of a stream of unknown length (Vitter, 1985).

Sample j of the stream, counted from 0, enters slot j while there is room; later it draws :math:`r` uniform on
:math:`\{0,\dots,j\}` and replaces slot r if :math:`r<M`. After n samples each one is held with probability
:math:`M/n`, whichever task it came from, and no boundary between tasks is needed.

>>> buffer = Reservoir(2, seed=0)
>>> buffer.add(torch.arange(100.0), torch.arange(100))
>>> x, y = buffer.draw(5)  # at most what is there, each once
>>> len(buffer), len(y), bool((x == y).all())
(2, 2, True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import integer

__all__ = ["Reservoir"]


class Reservoir:
    """Holds M samples of a stream, each a row in one or more tensors (image, label, logits ...).

    Rows are kept on the device of the first batch, in the widest type of integers or of floating-point numbers that
    came, so that every one is kept as it was; the generator lives on the CPU, so the choice does not depend on it.

    Args:
        size: M.
        seed: of what stays and of what is drawn.

    Raises:
        ValueError: M below 1; from ``add``, tensors of unequal length or unlike the ones before.
        TypeError: from ``add``, integers where there were floating-point numbers (images in 0..255 and in [0, 1]), or
            the other way round, or types that no third one holds. Nothing has changed then.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        integer("size", size, 1)
        self.size = size
        self.seen = 0
        self.rows: tuple[Tensor, ...] = ()
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return min(self.size, self.seen)

    def add(self, *batch: Tensor) -> None:
        """Offer the next samples of the stream: tensors ``(B, ...)``, stored as copies without gradient."""
        lengths = [len(t) for t in batch]
        if not batch or len(set(lengths)) > 1:
            raise ValueError(f"batch: expected tensors of one length, got {lengths}")
        want, got = ([tuple(t.shape[1:]) for t in group] for group in (self.rows or batch, batch))
        if want != got:
            raise ValueError(f"batch: expected rows of shapes {want}, as before, got {got}")
        types = [_wider(held.dtype, t.dtype) for held, t in zip(self.rows or batch, batch, strict=True)]
        if not self.rows:
            self.rows = tuple(t.new_zeros(self.size, *t.shape[1:]) for t in batch)
        self.rows = tuple(held.to(dtype) for held, dtype in zip(self.rows, types, strict=True))
        # eq-continual-reservoir:  slot j while j < M, then slot r ~ U{0..j} if r < M
        j = self.seen + torch.arange(lengths[0])
        r = (torch.rand(len(j), dtype=torch.float64, generator=self.generator) * (j + 1)).long()  # uniform on 0..j
        slot = torch.where(j < self.size, j, r)
        enters = slot < self.size
        # Of several samples of a batch that take the same slot the last one stays, as if they had come one by one.
        last = torch.full((self.size,), -1).scatter_reduce(0, slot[enters], enters.nonzero()[:, 0], "amax")
        slot = (last >= 0).nonzero()[:, 0]
        for held, new in zip(self.rows, batch, strict=True):
            held[slot.to(held.device)] = new.detach()[last[slot].to(new.device)].to(held)
        self.seen += lengths[0]

    def draw(self, n: int) -> tuple[Tensor, ...]:
        """``min(n, len(self))`` different samples at random, as tensors in the order in which they were added."""
        if len(self) == 0:
            raise ValueError("draw: expected a buffer that something was added to, got an empty one")
        integer("n", n, 1)
        i = torch.randperm(len(self), generator=self.generator)[:n]
        return tuple(held[i.to(held.device)] for held in self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on as if it had not been interrupted; tensors only, copied."""
        tensors = {f"rows.{i}": held.clone() for i, held in enumerate(self.rows)}
        return {"seen": torch.tensor(self.seen), "generator": self.generator.get_state(), **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` of a buffer of the same size gave."""
        rows = tuple(state[f"rows.{i}"].clone() for i in range(len(state) - 2))
        if any(len(held) != self.size for held in rows):
            raise ValueError(f"state: expected a buffer of {self.size} samples, got {[len(t) for t in rows]}")
        generator = torch.Generator()
        seen = int(state["seen"])
        generator.set_state(state["generator"])  # may fail: before anything is taken over
        self.rows = rows
        self.seen = seen
        self.generator = generator


def _wider(held: torch.dtype, new: torch.dtype) -> torch.dtype:
    """The type that holds the numbers of both exactly."""
    try:
        both = torch.promote_types(held, new)
    except RuntimeError:
        both = None
    if both is None or held.is_floating_point != new.is_floating_point or held.is_complex != new.is_complex:
        raise TypeError(f"batch: expected rows of {held}, as before, or of a type of its kind, got {new}")
    return both
