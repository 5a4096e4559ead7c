"""Naive twins of the theory of averaged models, of balanced averaging and of its measures: loops, one number at a time.

``Models`` is the paper's definition written out: features are vectors, a model is a mask over them and a linear head.
Nothing is counted there; the 1, 2 and 4 of the formulas have to come out by themselves.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.integrate import quad
from scipy.stats import norm


def quad_accuracy(x: float, p: float, classes: int) -> float:
    """F_p(x) as the paper's integral in one dimension, by adaptive quadrature."""
    own, common = math.sqrt(p / classes), math.sqrt(p * (classes + 1 - p * classes) / classes)

    def integrand(u: float) -> float:
        return norm.pdf(u) * math.exp((classes - 1) * norm.logcdf((x + common * u) / own))

    step = [-x / common] if abs(x / common) < 9 else None  # where the integrand rises
    return quad(integrand, -9, 9, epsabs=1e-12, limit=500, points=step)[0]


@dataclass
class Models:
    """Two linear models on feature vectors, the second with its head times ``a`` and its features times ``b``."""

    n_v: int
    n_s: int
    n_v2: int
    n_s2: int
    n_vo: int = 0
    n_so: int = 0
    classes: int = 3
    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        self.invariant = self.n_v + self.n_v2 - self.n_vo
        self.spurious = self.n_s + self.n_s2 - self.n_so
        d = self.invariant + self.spurious
        first = [*range(self.n_v), *range(self.invariant, self.invariant + self.n_s)]
        second = [*range(self.n_v - self.n_vo, self.invariant), *range(d - self.n_s2, d)]
        self.phi, self.phi2 = np.zeros(d), np.zeros(d)
        self.phi[first], self.phi2[second] = 1.0, self.b
        # each feature is a vector with orthonormal class means: the basis; a head sums the means of what it picked
        self.w = np.einsum("j,kc->kjc", self.phi, np.eye(self.classes))
        self.w2 = self.a * np.einsum("j,kc->kjc", self.phi2 > 0, np.eye(self.classes))

    def logits(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of the first, the second, the sum of outputs, the average of weights, for features ``(d, classes)``."""
        first = np.array([np.sum(w * x * self.phi[:, None]) for w in self.w])
        second = np.array([np.sum(w * x * self.phi2[:, None]) for w in self.w2])
        both, phi = (self.w + self.w2) / 2, (self.phi + self.phi2) / 2
        wse = np.array([np.sum(w * x * phi[:, None]) for w in both])
        return first, second, first + second, wse

    def features(self, pointed: list[int]) -> np.ndarray:
        """Features of a sample of class 0 whose spurious features point to these classes."""
        return np.eye(self.classes)[[0] * self.invariant + pointed]

    def exact(self, p: float) -> np.ndarray:
        """Accuracies of the four, over every outcome; a tie of t classes counts 1/t."""
        right = np.zeros(4)
        for pointed in itertools.product(range(self.classes), repeat=self.spurious):
            chance = math.prod((1 - p) * (k == 0) + p / self.classes for k in pointed)
            for i, z in enumerate(self.logits(self.features(list(pointed)))):
                top = np.flatnonzero(z > z.max() - 1e-9)
                right[i] += chance * (0 in top) / len(top)
        return right

    def moments(self, p: float) -> list[tuple[float, np.ndarray]]:
        """Mean margin and covariance of the margins of the four, over every outcome."""
        margins, chances = [], []
        for pointed in itertools.product(range(self.classes), repeat=self.spurious):
            chances.append(math.prod((1 - p) * (k == 0) + p / self.classes for k in pointed))
            margins.append([z[0] - z[1:] for z in self.logits(self.features(list(pointed)))])
        margins, chances = np.array(margins), np.array(chances)
        means = np.einsum("n,nmk->mk", chances, margins)
        centred = margins - means
        return [(means[m, 0], np.einsum("n,nk,nl->kl", chances, centred[:, m], centred[:, m])) for m in range(4)]

    def sample(self, p: float, draws: int, seed: int, noise: float = 1e-6) -> np.ndarray:
        """Monte Carlo, one sample and feature at a time: accuracies of the four, then the two shares of FFT."""
        rng, hits = np.random.default_rng(seed), np.zeros(6)
        for _ in range(draws):
            pointed = [int(rng.integers(self.classes)) if rng.random() < p else 0 for _ in range(self.spurious)]
            x = self.features(pointed)
            right = [int(np.argmax(z)) == 0 for z in self.logits(x + noise * rng.standard_normal(x.shape))]
            hits[:4] += right
            hits[4:] += [not right[0] and not right[1] and average for average in right[2:]]
        return hits / draws


# --- fine-tuning and measures -----------------------------------------------------------------------------------------
def loop_soft_cross_entropy(logits: list[list[float]], targets: list[list[float]]) -> float:
    total = 0.0
    for z, t in zip(logits, targets, strict=True):
        normaliser = math.log(sum(math.exp(v) for v in z))
        total -= sum(weight * (v - normaliser) for weight, v in zip(t, z, strict=True))
    return total / len(logits)


def loop_outcomes(y: list[int], first: list[int], second: list[int], average: list[int]) -> dict[str, int]:
    table = {"".join(cell): 0 for cell in itertools.product("FT", repeat=3)}
    for label, *predicted in zip(y, first, second, average, strict=True):
        table["".join("T" if k == label else "F" for k in predicted)] += 1
    return table


def loop_calibration_error(probs: list[list[float]], y: list[int], bins: int = 15) -> float:
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(probs, y, strict=True):
        top = max(row)
        b = 0
        while top > (b + 1) / bins and b < bins - 1:
            b += 1
        members[b].append((top, row.index(top) == label))
    error = 0.0
    for inside in filter(None, members):
        sure = sum(c for c, _ in inside) / len(inside)
        right = sum(r for _, r in inside) / len(inside)
        error += len(inside) / len(y) * abs(right - sure)
    return error
