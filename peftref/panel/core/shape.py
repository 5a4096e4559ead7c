"""How rich a polynomial may be, how much room it takes, and a basis for columns that nearly determine each other.

>>> from peftref.panel.core.ridge import PolynomialRidge
>>> choose_shape(PolynomialRidge("auto"), 3, 5000), choose_shape(PolynomialRidge("auto"), 30, 500)
((3, True, 0), (3, False, 0))
>>> n_monomials(2, 2, True)
5
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ridge import PolynomialRidge

# Larger ones would be chosen where much is noise, and shrink what confounds with it: that biases the effect.
PENALTIES = (0.01, 0.1, 1.0)
# Degree, whether with interactions, and the training rows for each feature that they need.
SHAPES = ((3, True, 5), (2, True, 2), (3, False, 2), (2, False, 2), (1, False, 0))
GROUPS = 4  # for each feature of the variables that are constant in groups, such as units
LIMIT = 1 << 31  # numbers in features or Gram matrices: 17 GB


def n_monomials(n: int, degree: int, interactions: bool = True) -> int:
    """Monomials of n variables of degrees 1 to ``degree``."""
    return comb(n + degree, degree) - 1 if interactions else n * degree


def choose_shape(
    learner: PolynomialRidge, n: int, rows: int, coarse: int = 0, groups: float = 0.0
) -> tuple[int, bool, int]:
    """Degree, whether with interactions, and how many variables enter linearly.

    Args:
        learner: whose degree counts, if it is a number.
        n: variables.
        rows: training rows.
        coarse: of the variables, so many are constant in groups; they enter linearly where groups are few.
        groups: such groups among the training rows.
    """
    if not isinstance(learner.degree, str):
        return learner.degree, learner.interactions, 0

    def fits(degree: int, interactions: bool, each: int, linear: int) -> bool:
        return each * (n_monomials(n - linear, degree, interactions) + linear) <= rows

    shapes = [shape for shape in SHAPES if shape[1] <= learner.interactions]
    found = []
    for degree, interactions, each in shapes:
        linear = 0 if GROUPS * n_monomials(coarse, degree, interactions) <= groups else coarse
        if fits(degree, interactions, each, linear):
            found.append((degree, interactions, linear))
    # rather products of the covariates, and their means as they are, than no products at all
    both = [(d, products, coarse) for d, products, each in shapes if products and fits(d, products, each, coarse)]
    return (both or found)[0] if coarse and not found[0][1] else found[0]


def check_room(n: int, degree: int, interactions: bool, rows: int, folds: int) -> None:
    """What the features of n variables would take, before they are built.

    Raises:
        ValueError: more than 17 GB.
    """
    p = n_monomials(n, degree, interactions)
    numbers = max(p * rows, folds * p * p)
    if numbers > LIMIT:
        raise ValueError(
            f"degree: expected a polynomial that fits into {8 * LIMIT / 1e9:.0f} GB, got {p} features of {n} variables "
            f"({8 * numbers / 1e9:.0f} GB): take a lower degree, interactions=False or degree='auto'"
        )


def well_conditioned(f: Tensor) -> tuple[Tensor, Tensor | None]:
    """An orthonormal basis of features ``(B, p, n)`` less their means, if products of them would lose what sets them
    apart; without a penalty both give the same predictions.

    Returns:
        Features ``(B, p, n)``, zeros beyond their rank, and the map ``(B, p, p)`` to them from ``f`` less its means;
        or ``f`` itself and ``None``, where it is good enough, or repeats itself exactly.
    """
    if f.shape[-1] < f.shape[-2]:
        return f, None
    centred = f - f.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    size = centred.square().sum(-1, keepdim=True).sqrt()
    scale = torch.where(size > 1e-12 * f.square().sum(-1, keepdim=True).sqrt(), 1 / size, 0.0)
    q, r = torch.linalg.qr((centred * scale).mT)
    u, s, v = torch.linalg.svd(r)
    kept = s > 1e-13 * f.shape[-2] * s[..., :1]
    if not (kept & (s < 1e-4 * s[..., :1])).any():
        return f, None
    back = torch.where(kept, 1 / s, 0.0).unsqueeze(-1) * v * scale.mT
    basis = (q @ u).mT * kept.unsqueeze(-1)
    length = f.shape[-1] ** 0.5
    return length * basis, length * back
