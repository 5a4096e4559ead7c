"""The frozen tensors of TeRA, shared by all layers of one shape.

>>> bank = Bank(seed=0)
>>> network = bank.network([(8, 8)], [(2, 2), (3, 3)], "random", saved=False)
>>> network is bank.network([(8, 8)], [(2, 2), (3, 3)], "random", saved=False), network.core.shape
(True, torch.Size([8, 6]))
>>> core, left, right = network.parts(torch.zeros(()))
>>> again = Bank(given=[(core, left, right)])                                  # tensors of one's own
>>> again.network([(8, 8)], [(2, 2), (3, 3)], "given", saved=False).core.equal(core)
True
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..._checks import finite, integer

__all__ = ["Bank"]

Tensors = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]  # core, left and right factors


class _Network(nn.Module):
    """The frozen tensors of one shape."""

    core: Tensor

    def __init__(
        self, seed: int, left: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]], factors: str, saved: bool
    ) -> None:
        super().__init__()
        # Shapes do not share entries. Torch's CPU generator reads 32 bits of a seed, so all goes into these.
        g = torch.Generator().manual_seed(zlib.crc32(repr((seed, tuple(left), tuple(right))).encode()))
        # Drawn on the CPU in float32, whatever the default device and type: the same on every machine.
        draw = functools.partial(torch.randn, generator=g, device="cpu", dtype=torch.float32)
        rows, columns = (math.prod(r for r, _ in side) for side in (left, right))
        self.register_buffer("core", draw(rows, columns) / math.sqrt(columns), persistent=saved)
        for name, side in (("left", left), ("right", right)):
            for n, (r, size) in enumerate(side):
                factor = draw(r, size) / math.sqrt(r)
                factor = factor if factors == "random" else torch.eye(r, size, device="cpu", dtype=torch.float32)
                self.register_buffer(f"{name}_{n}", factor, persistent=saved)
        self.sides = len(left), len(right)

    def keep(self, given: Tensors | None) -> None:
        """Keep these tensors instead of those drawn; None: of a file that is still to be read."""
        if given is None:
            for t in self.buffers():
                t.fill_(torch.nan)
            return
        core, left, right = given
        for name, value in (("core", core), *_numbered("left", left), *_numbered("right", right)):
            setattr(self, name, value.detach().clone())

    def parts(self, like: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Core, left and right factors where ``like`` is; elsewhere only if layers of one shape are on many devices."""
        left, right = (
            [getattr(self, f"{name}_{n}").to(like) for n in range(size)]
            for name, size in zip(("left", "right"), self.sides, strict=True)
        )
        return self.core.to(like), left, right


def _numbered(name: str, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"{name}_{n}", t) for n, t in enumerate(tensors))


class Bank:
    """The frozen tensors of all layers, kept once for each shape: give the same bank to all.

    Args:
        seed: of all that is drawn: with it, a saved adapter finds its bank again.
        given: instead of drawing, for layers with ``factors="given"``: a core ``(prod R, prod R)``, left and right
            factors ``(R_n, I_n)`` for each set of modes and ranks.

    Raises:
        ValueError: a seed outside [0, 2^31); tensors of shapes that do not fit each other, or that are not finite; or
            two sets of one shape.
    """

    def __init__(self, seed: int = 0, given: Iterable[Tensors] = ()) -> None:
        if integer("seed", seed, 0) >= 2**31:
            raise ValueError(f"seed: expected an integer in [0, 2^31), got {seed!r}")
        self.seed = seed
        self.given: dict[Hashable, Tensors] = {}
        self.networks: dict[tuple[Hashable, ...], _Network] = {}
        for one in given:
            core, left, right = _checked(one)
            key = tuple(map(_shapes, (left, right)))
            if key in self.given:
                raise ValueError(f"given: expected one set of tensors for each shape, got two for {key}")
            self.given[key] = core, left, right

    def network(
        self, left: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]], factors: str, saved: bool
    ) -> _Network:
        """The tensors for modes ``(R_n, I_n)``, drawn when they are first asked for."""
        key = (tuple(left), tuple(right), factors, saved)
        tensors = self.given.get(key[:2]) if factors == "given" else None
        if factors == "given" and tensors is None and not saved:
            raise ValueError(
                f"bank: expected one that was given tensors for (R_n, I_n) = {key[:2]}, got {[*self.given]}"
            )
        if key not in self.networks:
            self.networks[key] = _Network(self.seed, *key)
            if factors == "given":
                self.networks[key].keep(tensors)
        return self.networks[key]


def _checked(one: Tensors) -> Tensors:
    if not isinstance(one, Sequence) or len(one) != 3 or not all(isinstance(side, Sequence) for side in one[1:]):
        raise ValueError(f"given: expected (core, left, right) of each shape, got {one!r}")
    core, left, right = one
    parts = [core, *left, *right]
    if not all(isinstance(t, Tensor) and t.ndim == 2 and t.is_floating_point() for t in parts) or not (left and right):
        raise ValueError(f"given: expected a core and factors that are matrices, got {one!r}")
    ranks = [math.prod(r for r, _ in _shapes(side)) for side in (left, right)]
    if list(core.shape) != ranks:
        raise ValueError(f"given: expected a core {ranks} for these factors, got {tuple(core.shape)}")
    for t in parts:
        finite("given", t)
    return core, list(left), list(right)


def _shapes(side: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((t.shape[0], t.shape[1]) for t in side)
