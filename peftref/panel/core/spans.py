"""Variables whose features nearly determine each other, changed for others that span the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ridge import polynomial
from .shape import well_conditioned


def independent(
    z: Tensor, exponents: Tensor, uses: Sequence[Sequence[int]] | None, q: int
) -> tuple[Tensor, Tensor, Sequence[Sequence[int]] | None]:
    """Where features nearly determine each other, and nothing is penalised: variables that span the same, with
    exponents one, for each set of variables that some target uses."""
    sets = [tuple(used) for used in uses] if uses else [tuple(range(z.shape[-2]))] * q
    features = polynomial(z, exponents)
    made = {}
    for used in dict.fromkeys(sets):
        absent = [j for j in range(z.shape[-2]) if j not in used]
        made[used] = well_conditioned(features[..., exponents[:, absent].sum(1) == 0, :])
    if all(back is None for _, back in made.values()):
        return z, exponents, uses
    places = {}
    start = 0
    for used, (basis, _) in made.items():
        places[used] = range(start, start + basis.shape[-2])
        start += basis.shape[-2]
    together = torch.cat([basis for basis, _ in made.values()], -2)
    return together, torch.eye(start, dtype=torch.long), [places[used] for used in sets]
