r"""What each estimator lets its learner know, and where it takes means of units away (eq-dml_panel-sets).

===============  ===========================  ======================  ========================================
estimator        z, for Y and for W           means taken away        source
===============  ===========================  ======================  ========================================
``pooled``       :math:`x_{it}`               never                   Fuhr and Papies (their PDML)
``early``        :math:`\ddot x_{it}`         before learning         the same; ``wg_approx`` of DoubleML
``late``         :math:`x_{it}`               from u and v            the same
``dummies``      :math:`x_{it}`, and a        never                   the same
                 column for each unit
``cre``          :math:`x_{it},\bar x_i,      never                   the same (Mundlak)
                 \bar w_i`
``cre_general``  :math:`x_{it},\bar x_i`      from v                  DoubleML, xtdml
``cre_normal``   :math:`x_{it},\bar x_i`;     never                   DoubleML, xtdml
                 for W also :math:`\bar w_i`
``fd``           :math:`x_{it},x_{i,t-1}`     Y and W are             DoubleML, xtdml (``fd_exact``)
                                              differences
===============  ===========================  ======================  ========================================

``cre_general`` is written as a shift of the prediction, :math:`\hat m+\bar w_i-\overline{\hat m}_i`; its residual is v
with the mean of each unit taken away. ``twoway`` treats periods as it does units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .columns import Panel
from .folds import Folds
from .layout import means, within

__all__ = ["SETS", "Fit", "partial_out", "transform", "variables"]

SETS = {  # what predicts Y, and what predicts W: x, its means b, the means m of W
    "pooled": ("x", "x"),
    "early": ("x", "x"),
    "late": ("x", "x"),
    "dummies": ("x", "x"),
    "cre": ("xbm", "xbm"),
    "cre_general": ("xb", "xb"),
    "cre_normal": ("xb", "xbm"),
    "fd": ("x", "x"),
}
Fit = Callable[..., Tensor]  # crossfit or crossfit_sklearn, with its learner


def transform(estimator: str, panel: Panel, twoway: bool = False) -> Panel:
    """The panel that an estimator learns from: within units for ``early`` (and ``fe``, ``fe_only``), differences for
    ``fd``, else as it is.

    Raises:
        ValueError: for ``fd``, no rows in consecutive periods, or a treatment with constant differences.
    """
    y, w, x, layout = panel
    if estimator in ("early", "fe", "fe_only"):
        return Panel(within(y, layout, twoway), within(w, layout, twoway), within(x, layout, twoway), layout)
    if estimator == "fd":
        now, before = layout.consecutive()
        if not len(now):
            raise ValueError("time: expected rows in consecutive periods for the estimator 'fd', got none")
        dy, dw = (t[..., now] - t[..., before] for t in (y, w))
        if ((dw - dw.mean(-1, keepdim=True)).abs().amax(-1) <= 1e-10 * w.abs().amax(-1)).any():
            raise ValueError("w: expected a treatment whose differences vary, got one whose differences are constant")
        return Panel(dy, dw, torch.cat((x[..., now], x[..., before]), -2), layout.select(now))
    return panel


def partial_out(
    estimators: Sequence[str], panel: Panel, folds: Folds, fit: Fit, *, twoway: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Residuals u and v of several estimators that learn from the same panel, in one cross-fit (eq-dml_panel-sets).

    Args:
        estimators: names of the table above; ``early``, ``fd`` and ``dummies`` by themselves, on the panel of
            :func:`transform`.
        panel: ``y`` and ``w`` ``(B or 1, n)``, ``x`` ``(B or 1, J, n)``, and the layout.
        folds: ``(B or 1, n)``.
        fit: :func:`~peftref.panel.core.crossfit.crossfit` or its like: ``fit(z, targets, folds, uses=..., ...)``.
        twoway: means of periods besides those of units.

    Returns:
        For each estimator u and v, ``(B, n)``.
    """
    unknown = [name for name in estimators if name not in SETS]
    if unknown or not estimators:
        raise ValueError(f"estimators: expected some of {', '.join(SETS)}, got {unknown or 'none'}")
    y, w, x, layout = panel
    more: dict[str, Any] = {}
    if "dummies" in estimators:
        z = x
        places = {"x": list(range(x.shape[-2]))}
        more["unit"] = layout.unit
        if twoway:  # periods are few: a column for each
            onehot = torch.nn.functional.one_hot(layout.time).T.to(x)
            z = torch.cat((x, onehot.expand(len(x), -1, -1)), -2)
            more["linear"] = len(onehot)
            places["x"] += range(x.shape[-2], z.shape[-2])
    else:
        z, places = variables(panel, "".join(of_y + of_w for of_y, of_w in map(SETS.__getitem__, estimators)), twoway)
        # without m, what differs between units, and is all that their means explain, leaves v anyway
        groups = layout.n_units if "m" in places else math.inf
        if "b" in places or "m" in places:
            more["coarse"] = (z.shape[-2] - x.shape[-2], groups)
    models = list(dict.fromkeys((i, keys) for name in estimators for i, keys in enumerate(SETS[name])))  # each once
    size = max(len(y), len(w))
    targets = torch.stack([(y, w)[i].expand(size, -1) for i, _ in models], 1)
    predicted = fit(z, targets, folds, uses=[[j for key in keys for j in places[key]] for _, keys in models], **more)
    residuals = dict(zip(models, (targets - predicted).unbind(1), strict=True))
    found = {}
    for name in estimators:
        u, v = (residuals[model] for model in enumerate(SETS[name]))
        u = within(u, layout, twoway) if name == "late" else u
        # cre_general:  w - (m + mean_i(w) - mean_i(m)) = v - mean_i(v)
        v = within(v, layout, twoway) if name in ("late", "cre_general") else v
        found[name] = u, v
    return found


def variables(panel: Panel, wanted: str, twoway: bool = False) -> tuple[Tensor, dict[str, list[int]]]:
    """What a learner may know (eq-dml_panel-sets): variables ``(B, J', n)``, and which of them x, its means b and the
    means m of the treatment are; of those in ``wanted`` only."""
    codes = (panel.layout.unit, panel.layout.time) if twoway else (panel.layout.unit,)
    parts = {"x": [panel.x]}
    if "b" in wanted:
        parts["b"] = [means(panel.x, code) for code in codes]
    if "m" in wanted:
        parts["m"] = [means(panel.w, code).unsqueeze(-2) for code in codes]
    places = {}
    start = 0
    for key, tensors in parts.items():
        stop = start + sum(t.shape[-2] for t in tensors)
        places[key] = list(range(start, stop))
        start = stop
    return torch.cat([t for tensors in parts.values() for t in tensors], -2), places
