r"""Double machine learning for panels: an effect under nonlinear confounding and fixed differences between units.

Fuhr, Papies, "Double Machine Learning meets Panel Data - Promises, Pitfalls, and Potential Solutions", arXiv
2409.01266. Clarke, Polselli, "Double Machine Learning for Static Panel Models with Fixed Effects", Econometrics
Journal, 2025.

Units i and periods t; outcome Y, treatment W, covariates X, and an unobserved :math:`U_i` (eq-dml_panel-model):

.. math:: Y_{it}=\beta W_{it}+m_0(X_{it})+\delta U_i+\mu_{it},\qquad W_{it}=g_0(X_{it})+\delta U_i+\eta_{it}.

With :math:`u=Y-\hat E[Y\mid z]` and :math:`v=W-\hat E[W\mid z]`, predicted out of fold, the estimate solves
(eq-dml_panel-score; the second is the IV-type score, with :math:`\hat g` fitted to :math:`Y-\hat\theta_{\rm init}W`)

.. math:: \sum v\,(u-\theta v)=0,\qquad\text{or}\qquad\sum v\,(Y-\hat g-\theta W)=0 .

The estimators differ in what the learner may know of a unit, z, and in where means of units are taken away; their table
(eq-dml_panel-sets) is in :mod:`peftref.panel.core.estimators`. Without learning there are ``simple_ols`` (Y on W),
``pols`` (and X), ``fe_only`` (Y on W within units) and ``fe`` (and X), which split nothing.

The paper fits DML1 and reports no standard errors; by default we solve DML2 with whole units in a fold and errors
clustered by unit, as DoubleML does (:mod:`peftref.panel.core.inference`). ``early`` leaves the grand mean out, as the
paper does; DoubleML adds it back, which a learner with an intercept does not notice, but the IV-type score, slightly,
does. In that score we take the mean of W away; DoubleML does not, and its standard error moves with the level of W.

For a binary treatment ``model="irm"`` estimates the average effect without a linear model (eq-dml_panel-aipw),

.. math:: \psi=g_1-g_0+\frac{W(Y-g_1)}{m}-\frac{(1-W)(Y-g_0)}{1-m}-\theta .

The chapter also shows what a unit's means tell of it (eq-dml_panel-betray), and why a square that has lost its mean is
no function of a variable that has lost its own (eq-dml_panel-square).

>>> from peftref.panel.experiments.dgp import dgp_fuhr_papies_2024
>>> data = dgp_fuhr_papies_2024("C", "u-shaped", n_units=200, gamma=1.0, delta=1.0, seeds=[0]).frame()
>>> arguments = data["y"], data["w"], data[["x1"]], data["unit"], data["time"]
>>> for name in ("fe", "pooled", "cre"):  # the true effect is 1
...     print(name, PanelDML(name).fit(*arguments).coef_.__round__(1))
fe 1.9
pooled 1.3
cre 1.0
>>> PanelDML("cre").fit(*arguments).summary().round(2)[["coef", "std err", "2.5 %", "97.5 %"]]
   coef  std err  2.5 %  97.5 %
w  1.03     0.02   0.99    1.08
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from scipy.stats import norm
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from .baselines.linear import LINEAR, linear_residuals
from .core.columns import Panel, read_panel
from .core.crossfit import crossfit
from .core.dummies import as_ours
from .core.estimators import SETS, Fit, partial_out, transform, variables
from .core.folds import Folds, make_folds
from .core.inference import check_clusters, over_repeats, row_weights, solve, standard_error
from .core.layout import within
from .core.learners import crossfit_sklearn
from .core.ridge import PolynomialRidge
from .core.settings import ESTIMATORS, check_settings

AUTO = PolynomialRidge("auto", "auto")  # the learner if none is given

__all__ = ["ESTIMATORS", "PanelDML", "aipw_score", "plr_score"]


def plr_score(v: Tensor, u: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Slope and constant of the score of the partially linear model (eq-dml_panel-score): v (u - theta v).

    Args:
        v: residuals of the treatment.
        u: residuals of the outcome; for the IV-type score Y - g.
        w: the treatment, for the IV-type score.
    """
    # eq-dml_panel-score:  v (u - theta v),  or  v (Y - g - theta W)
    return -v * (v if w is None else w), v * u


def aipw_score(y: Tensor, w: Tensor, g0: Tensor, g1: Tensor, m: Tensor, clip: float = 0.01) -> tuple[Tensor, Tensor]:
    """Slope and constant of the score of the interactive model (eq-dml_panel-aipw).

    g1 - g0 + W (Y - g1) / m - (1 - W) (Y - g0) / (1 - m) - theta.

    Args:
        y: outcomes.
        w: treatments, 0 or 1.
        g0: predicted outcomes without treatment.
        g1: predicted outcomes with treatment.
        m: propensities.
        clip: they are clipped to [clip, 1 - clip].
    """
    m = m.clamp(clip, 1 - clip)
    # eq-dml_panel-aipw
    return -torch.ones_like(y), g1 - g0 + w * (y - g1) / m - (1 - w) * (y - g0) / (1 - m)


class PanelDML(BaseEstimator):
    """The effect of a treatment in a panel, ``PanelDML().fit(y, w, x, unit, time)``; then ``summary()``.

    Residuals u of the outcome and v of the treatment, each predicted for rows that the learner has not seen; the
    estimate is theta = sum(v u) / sum(v^2).

    Coverage of 95 % intervals, in % of 300 simulated panels of the chapter (structure C, 200 units, quadratic ridge):

    ==========================================  ==========  ========
    confounding, periods, estimator             folds       coverage
    ==========================================  ==========  ========
    linear, 10, "cre"                           of units    95
    squared, 10, "cre"                          of units    53
    squared, 10, "cre"                          of rows     56
    squared, 40, "cre"                          of units    82
    squared and the square given, 10, "cre"     of units    95
    squared, 10, "cre_general"                  of units    94
    squared, 10, "fd"                           of units    94
    ==========================================  ==========  ========

    Args:
        estimator: a name of those in :mod:`peftref.panel.core.estimators`. "cre_general" assumes that the differences
            between units that matter are constant in time, "cre", the paper's, that the unit's means tell of them:
            under squared confounding its intervals cover too seldom (see the table), unless the covariates are given
            transformed too. ``model="irm"`` needs "cre", "cre_normal" or "pooled".
        learner: any scikit-learn regressor; by default a :class:`~peftref.panel.core.ridge.PolynomialRidge`, the
            fastest, whose degree follows from the numbers of rows and variables (cubic, where they allow it) and whose
            penalty is chosen on the folds. Beware of histogram boosting: its coarse bins bias all estimators.
        learner_w: for the treatment, if another; with ``model="irm"`` a classifier (logistic regression).
        model: "plr", partially linear, or "irm", for a binary treatment with ``pooled``, ``cre`` or ``cre_normal``.
        score: "partialling out" or "IV-type".
        agg: "dml2" or the paper's "dml1".
        folds: K, or :class:`~peftref.panel.core.folds.Folds` of your own on the rows that the estimator uses, sorted by
            unit and period: for "fd" on the differences, without the first row of each unit or after a gap.
        scheme: how rows are split, see :mod:`peftref.panel.core.folds`; the paper takes "random".
        repeats: R independent splits, of which the median counts.
        twoway: fixed differences between periods too.
        cluster: of the standard error: "unit", "twoway" (with ``scheme="product"``, where something is learned), or
            ``None``; see :func:`~peftref.panel.core.inference.standard_error`.
        clip: bound on propensities, for "irm".
        seed: of the splits.
        n_jobs: of joblib, for learners other than ours.

    Attributes:
        coef_: the estimate.
        se_: its standard error.
        coefs_: the estimate of each split, ``(R,)``.
        ses_: its standard error, ``(R,)``.
        residuals_: columns ("y", r) and ("w", r) for each split r, in the caller's order; missing in rows not used.
        predictions_: likewise, what was predicted out of fold, of the columns that the estimator learns from (for
            "early" within units, for "fd" differences): ("y", r), ("w", r); with ``model="irm"`` ("g0", r), ("g1", r),
            the outcomes without and with treatment, and ("m", r), the propensity before it is clipped.
        folds_: the splits, on the rows sorted by unit and period.
        n_rows_: number of rows used.
        n_units_: number of units used.

    Means of units are taken over all of their rows, test rows included, as the paper and DoubleML do. With folds that
    cut through units the mean of W thus leaks a little of the test rows into ``cre``.
    """

    def __init__(
        self,
        estimator: str = "cre_general",
        learner: Any = None,
        learner_w: Any = None,
        *,
        model: str = "plr",
        score: str = "partialling out",
        agg: str = "dml2",
        folds: int | Folds = 5,
        scheme: str = "unit",
        repeats: int = 1,
        twoway: bool = False,
        cluster: str | None = "unit",
        clip: float = 0.01,
        seed: int = 0,
        n_jobs: int | None = None,
    ) -> None:
        self.estimator = estimator
        self.learner = learner
        self.learner_w = learner_w
        self.model = model
        self.score = score
        self.agg = agg
        self.twoway = twoway
        self.folds = folds
        self.scheme = scheme
        self.repeats = repeats
        self.cluster = cluster
        self.clip = clip
        self.seed = seed
        self.n_jobs = n_jobs

    def fit(self, y: Any, w: Any, x: Any = None, unit: Any = None, time: Any = None) -> PanelDML:
        """Estimate.

        Args:
            y: outcome, ``(n,)``, a Series or an array.
            w: treatment, ``(n,)``.
            x: covariates, a DataFrame or array ``(n, J)``.
            unit: labels ``(n,)``; rows may be in any order.
            time: labels ``(n,)``: numbers, dates or an ordered category; units may miss periods.

        Raises:
            TypeError, ValueError: columns that are missing, unequal in length or index, not numeric or not finite;
                settings that do not exist or do not fit each other; a treatment or covariate without variation;
                periods whose labels have no order in time, such as text; a single cluster.
        """
        check_settings(self)
        panel, frame = read_panel(y, w, x, unit, time, estimator=self.estimator, twoway=self.twoway)
        panel = transform(self.estimator, panel, self.twoway)
        check_clusters(panel.layout, self.cluster, stacklevel=0)
        folds = self.folds
        if self.estimator in LINEAR:  # nothing is learned, so nothing is split
            folds = Folds(torch.zeros_like(panel.layout.unit)[None], torch.ones(1, 1, dtype=torch.bool))
        elif not isinstance(folds, Folds):
            folds = make_folds(panel.layout, folds, self.scheme, repeats=self.repeats, seed=self.seed)
        elif folds.fold.shape[1] != len(panel.layout):
            used = "differences, one for each row with a row of its unit in the period before" * (
                self.estimator == "fd"
            )
            used = used or "rows used, without units that have a single row" * (len(panel.layout) < len(frame.index))
            raise ValueError(
                f"folds: expected folds of {len(panel.layout)} {used or 'rows'}, got those of {folds.fold.shape[1]}"
            )
        elif any(row.unique().tolist() != list(range(len(folds))) for row in folds.fold):
            raise ValueError(f"folds: expected rows in each of the folds 0 to {len(folds) - 1}")
        weights = row_weights(panel.layout, folds, self.cluster)
        if self.model == "irm":
            psi_a, psi_b, u, v, predicted = self._interactive(panel, folds)
        else:
            psi_a, psi_b, u, v = self._partially_linear(panel, folds)
            predicted = {"y": panel.y - u, "w": panel.w - v}
        self.coefs_ = solve(psi_a, psi_b, weights, folds, self.agg)
        self.ses_ = standard_error(psi_a * self.coefs_.unsqueeze(1) + psi_b, psi_a, panel.layout, folds, self.cluster)
        self.coef_, self.se_ = over_repeats(self.coefs_, self.ses_)
        self.residuals_ = frame.align({"y": u, "w": v}, panel.layout)
        self.predictions_ = frame.align(predicted, panel.layout)
        self.n_rows_ = len(panel.layout)
        self.n_units_ = panel.layout.n_units
        self.folds_ = folds
        self._name = frame.name
        return self

    def confint(self, level: float = 0.95) -> pd.DataFrame:
        """The interval that covers the effect with probability ``level``, by the normal distribution."""
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number in (0, 1), got {level}")
        check_is_fitted(self)
        ends = {f"{100 * q:.6g} %": self.coef_ + norm.ppf(q) * self.se_ for q in ((1 - level) / 2, (1 + level) / 2)}
        return pd.DataFrame(ends, index=[self._name])

    def summary(self) -> pd.DataFrame:
        """Coefficient, standard error, t, p and the 95 % interval, as DoubleML prints them."""
        check_is_fitted(self)
        t = self.coef_ / self.se_ if self.se_ else math.copysign(math.inf, self.coef_)
        row = {"coef": self.coef_, "std err": self.se_, "t": t, "P>|t|": 2 * norm.sf(abs(t))}
        return pd.DataFrame(row, index=[self._name]).join(self.confint())

    def _partially_linear(self, panel: Panel, folds: Folds) -> tuple[Tensor, ...]:
        if self.estimator in LINEAR:
            u, v = linear_residuals(self.estimator, panel, self.twoway)
        else:
            fit = self._fit()
            u, v = partial_out([self.estimator], panel, folds, fit, twoway=self.twoway)[self.estimator]
        spread = (panel.w - panel.w.mean()).square().sum()
        if not (v.square().sum(-1) > 1e-12 * spread).all():
            raise ValueError("w: expected a treatment that z does not determine, got residuals of zero")
        if self.score == "partialling out" or self.estimator in LINEAR:
            return *plr_score(v, u), u, v
        # A first estimate over all rows; then g is learned from what W leaves of Y, with the features of E[Y | z].
        first = (v * u).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
        rest = panel._replace(y=panel.y - first * panel.w)
        again = partial_out([self.estimator], rest, folds, fit, twoway=self.twoway)
        w = within(panel.w, panel.layout, self.twoway) if self.estimator == "late" else panel.w
        w = w - w.mean(-1, keepdim=True)  # or the standard error would move with the level of W, which means nothing
        return *plr_score(v, again[self.estimator][0] + first * w, w), u, v  # Y - g = (Y - first W - g) + first W

    def _interactive(self, panel: Panel, folds: Folds) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        treated = panel.w[0] == 1
        if not (treated | (panel.w[0] == 0)).all():
            raise ValueError(f"w: expected zeros and ones for the model 'irm', got {panel.w.unique().tolist()[:4]}")
        g = AUTO if self.learner is None else self.learner
        m = make_pipeline(StandardScaler(), LogisticRegression()) if self.learner_w is None else self.learner_w
        z, places = variables(panel, "".join(SETS[self.estimator]), self.twoway)
        for_y, for_w = ([i for key in keys for i in places[key]] for keys in SETS[self.estimator])
        predicted = crossfit_sklearn(
            z,
            torch.stack((panel.y, panel.y, panel.w), 1),
            folds,
            (g, g, m),
            uses=(for_y, for_y, for_w),
            within=(~treated, treated, None),
            n_jobs=self.n_jobs,  # g_0 learns from untreated rows, g_1 from treated
        )
        g0, g1, m = predicted.unbind(1)
        psi_a, psi_b = aipw_score(panel.y, panel.w, g0, g1, m, self.clip)
        u = panel.y - torch.where(treated, g1, g0)
        return psi_a.expand_as(psi_b), psi_b, u, panel.w - m, {"g0": g0, "g1": g1, "m": m}

    def _fit(self) -> Fit:
        """The cross-fit with our learner in one go, or with any other, model by model."""
        learner = AUTO if self.learner is None else self.learner
        learner = as_ours(learner) if self.estimator == "dummies" else learner  # which has no columns of units to build
        learner_w = learner if self.learner_w is None else self.learner_w
        if type(learner) is PolynomialRidge and self.learner_w is None:  # a subclass may learn in its own way
            return lambda z, targets, folds, **more: crossfit(z, targets, folds, learner, **more)
        both = (learner, learner_w)
        return lambda z, targets, folds, **more: crossfit_sklearn(z, targets, folds, both, n_jobs=self.n_jobs, **more)
