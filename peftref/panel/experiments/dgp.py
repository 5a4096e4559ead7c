r"""Simulated panels whose effect is known, named by their source; many datasets at once, each by its own seed.

``dgp_fuhr_papies_2024`` (their section 4.2): one outcome, one treatment, J covariates and a unit's :math:`U_i`,

.. math:: X_{jit}&=\alpha_{0j}+\delta U_i[\text{C}]+\varepsilon_{jit},\\
          W_{it}&=\alpha_1+\tfrac1J\sum_j\gamma_j\,g_0(X_{jit})+\delta U_i[\text{B, C}]+\eta_{it},\\
          Y_{it}&=\alpha_2+\beta W_{it}+\tfrac1J\sum_j\gamma_j\,g_0(X_{jit})+\delta U_i[\text{B, C}]+\mu_{it},

with :math:`g_0(x)=x` or :math:`x^2`, all variables and constants standard normal, and :math:`\gamma,\delta` drawn once
for each dataset. That the equations share one :math:`\gamma` and one :math:`\delta` is not written in the paper; it
follows from its figures, where all biases are positive, as :math:`\gamma^2` and :math:`\delta^2` are.

``dgp_clarke_polselli_2025`` has 30 covariates of which two matter, in three designs.

The noise depends on the seed and the sizes alone. Datasets of one seed in different structures, shapes or designs, or
with another ``beta``, ``gamma``, ``delta``, ``rho``, ``twoway`` or ``theta``, differ in nothing else: a comparison of
them is not a matter of luck.

>>> data = dgp_fuhr_papies_2024("C", "u-shaped", n_units=3, n_periods=2, seeds=[0, 1])
>>> data.panel.y.shape, data.panel.x.shape, data.frame(1).columns.tolist()
(torch.Size([2, 6]), torch.Size([2, 1, 6]), ['unit', 'time', 'y', 'w', 'x1'])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..._checks import integer
from ..core.columns import Panel
from ..core.layout import Layout

__all__ = ["Simulated", "dgp_clarke_polselli_2025", "dgp_fuhr_papies_2024"]

SHAPES: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {"linear": lambda x: x, "u-shaped": np.square}


@dataclass(frozen=True, eq=False)
class Simulated:
    """A batch of simulated datasets.

    Attributes:
        panel: the variables, in float64.
        confounding: what the covariates really add to the outcome, ``(B, n)``; an oracle would know it.
        effect: the true effect.
        parameters: what was drawn once for each dataset.
    """

    panel: Panel
    confounding: Tensor
    effect: float
    parameters: pd.DataFrame

    def to(self, device: torch.device | str) -> Simulated:
        """The same on a device."""
        y, w, x, layout = self.panel
        panel = Panel(y.to(device), w.to(device), x.to(device), layout.to(device))
        return Simulated(panel, self.confounding.to(device), self.effect, self.parameters)

    def frame(self, i: int = 0) -> pd.DataFrame:
        """Dataset i as a table with the columns unit, time, y, w, x1, ..., xJ."""
        y, w, x, layout = self.panel
        columns = {"unit": layout.unit, "time": layout.time, "y": y[i], "w": w[i]}
        columns |= {f"x{j + 1}": row for j, row in enumerate(x[i])}
        return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


def dgp_fuhr_papies_2024(
    structure: str = "C",
    shape: str = "u-shaped",
    *,
    n_units: int = 500,
    n_periods: int = 10,
    n_covariates: int = 1,
    beta: float = 1.0,
    gamma: float | None = None,
    delta: float | None = None,
    rho: float = 0.0,
    twoway: bool = False,
    seeds: Sequence[int] = (0,),
) -> Simulated:
    """Datasets of Fuhr and Papies (2024).

    Args:
        structure: "A", no unobserved differences; "B", they act on W and Y; "C", on X too.
        shape: "linear" or "u-shaped".
        n_units: N.
        n_periods: T, of every unit.
        n_covariates: J; of several, the noise is correlated by a random matrix.
        beta: the effect.
        gamma: strength of the confounding, one for all covariates, instead of random ones.
        delta: strength of U instead of a random one.
        rho: autoregression of the outcome's noise, in (-1, 1), from its stationary law on.
        twoway: periods have a :math:`U_t` that acts as :math:`U_i` does, with the same factor.
        seeds: one for each dataset.

    Raises:
        ValueError: an unknown structure or shape, sizes below 1, or ``rho`` outside its range.
    """
    if structure not in ("A", "B", "C"):
        raise ValueError(f"structure: expected 'A', 'B' or 'C', got {structure!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    if not -1 < rho < 1:
        raise ValueError(f"rho: expected a number in (-1, 1), got {rho!r}")
    integer("n_covariates", n_covariates, 1)
    layout = _grid(n_units, n_periods)
    size = (n_units, n_periods)
    seeds = _check_seeds(seeds)
    values = torch.empty(len(seeds), 3 + n_covariates, *size, dtype=torch.float64)
    drawn = []
    for seed, out in zip(seeds, values.numpy(), strict=True):
        rng = np.random.default_rng(seed)
        # Everything is drawn, used or not, and in this order: what one setting leaves out must not move the rest.
        g = rng.normal(size=n_covariates)
        d = rng.normal()
        a0 = rng.normal(size=n_covariates)
        (a1, a2) = rng.normal(size=2)
        of_unit = rng.normal(size=(n_units, 1))
        epsilon = rng.normal(size=(n_covariates, *size))
        mixing = rng.normal(size=(n_covariates, n_covariates)) if n_covariates > 1 else np.ones((1, 1))
        eta = rng.normal(size=size)
        mu = rng.normal(size=size)
        of_period = rng.normal(size=n_periods)
        g = g if gamma is None else np.full(n_covariates, float(gamma))
        d = d if delta is None else float(delta)
        u = d * (of_unit + of_period if twoway else of_unit)
        x = a0[:, None, None] + (structure == "C") * u + np.einsum("kj,kit->jit", mixing, epsilon)
        effect = np.tensordot(g / n_covariates, SHAPES[shape](x), 1)
        w = a1 + effect + (structure != "A") * u + eta
        y = a2 + beta * w + effect + (structure != "A") * u + _autoregressive(mu, rho)
        out[0] = y
        out[1] = w
        out[2] = effect
        out[3:] = x
        names = [*(f"{name}{j + 1}" for name in ("gamma", "alpha0_") for j in range(n_covariates)), "alpha1", "alpha2"]
        drawn.append({"seed": seed, "delta": d} | dict(zip(names, (*g, *a0, a1, a2), strict=True)))
    return _batch(values, layout, beta, drawn)


def dgp_clarke_polselli_2025(
    design: int = 1,
    *,
    n_units: int = 250,
    n_periods: int = 10,
    n_covariates: int = 30,
    theta: float = 0.5,
    seeds: Sequence[int] = (0,),
) -> Simulated:
    """Datasets of Clarke and Polselli (2025), as DoubleML's ``make_plpr_CP2025`` has them.

    Args:
        design: of the confounding: 1 linear, 2 smooth, 3 with kinks; only the first and third covariate matter.
        n_units: N.
        n_periods: T, of every unit.
        n_covariates: 3 or more.
        theta: the effect.
        seeds: one for each dataset.

    Raises:
        ValueError: an unknown design, or sizes that are too small.
    """
    if design not in (1, 2, 3):
        raise ValueError(f"design: expected 1, 2 or 3, got {design!r}")
    integer("n_covariates", n_covariates, 3)
    layout = _grid(n_units, n_periods)
    size = (n_units, n_periods)
    a = 0.25
    b = 0.5
    seeds = _check_seeds(seeds)
    values = torch.empty(len(seeds), 3 + n_covariates, *size, dtype=torch.float64)
    for seed, out in zip(seeds, values.numpy(), strict=True):
        rng = np.random.default_rng(seed)
        x = rng.normal(scale=5**0.5, size=(n_covariates, *size))
        own = rng.normal(scale=0.95**0.5, size=(n_units, 1))
        c = rng.normal(size=(n_units, 1))
        p = x[0]
        q = x[2]
        g, m = {
            1: lambda p, q: (a * p + q, a * p + q),
            2: lambda p, q: (_logistic(p) + a * np.cos(q), np.cos(p) + a * _logistic(q)),
            3: lambda p, q: (b * p * q + a * q * (q > 0), a * p * (p > 0) + b * p * q),
        }[design](p, q)
        w = m + c + rng.normal(size=size)
        alpha = a * (w.mean(1, keepdims=True) - w.mean()) + a * (p + q).mean(1, keepdims=True) + own
        y = theta * w + g + alpha + rng.normal(size=size)
        out[0] = y
        out[1] = w
        out[2] = g
        out[3:] = x
    return _batch(values, layout, theta, [{"seed": seed} for seed in seeds])


def _check_seeds(seeds: Sequence[int]) -> list[int]:
    seeds = list(seeds)
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    if not all(isinstance(seed, Integral) and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds: expected integers from 0 on, got {seeds}")
    return seeds


def _grid(n_units: int, n_periods: int) -> Layout:
    integer("n_units", n_units, 1)
    integer("n_periods", n_periods, 1)
    unit = torch.arange(n_units).repeat_interleave(n_periods)
    time = torch.arange(n_periods).repeat(n_units)
    return Layout(unit, time, torch.arange(n_units * n_periods), n_units, n_periods)


def _batch(values: Tensor, layout: Layout, effect: float, drawn: list[dict[str, Any]]) -> Simulated:
    values = values.flatten(2)
    panel = Panel(values[:, 0], values[:, 1], values[:, 3:], layout)
    return Simulated(panel, values[:, 2], effect, pd.DataFrame(drawn).set_index("seed"))


def _autoregressive(e: NDArray[Any], rho: float) -> NDArray[Any]:
    mu = e.copy()
    mu[:, 0] /= (1 - rho**2) ** 0.5
    for t in range(1, e.shape[1]):
        mu[:, t] += rho * mu[:, t - 1]
    return mu


def _logistic(x: NDArray[Any]) -> NDArray[Any]:
    share: NDArray[Any] = 1 / (1 + np.exp(-x))
    return share
