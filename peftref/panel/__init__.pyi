# ruff: noqa: I001
# Written by `python -m tools.stubs` from the `__all__` of the modules.
from .baselines.linear import LINEAR as LINEAR
from .baselines.linear import linear_residuals as linear_residuals
from .baselines.linear import panel_ols as panel_ols
from .core.columns import Frame as Frame
from .core.columns import Panel as Panel
from .core.columns import read_panel as read_panel
from .core.crossfit import crossfit as crossfit
from .core.estimators import Fit as Fit
from .core.estimators import SETS as SETS
from .core.estimators import partial_out as partial_out
from .core.estimators import transform as transform
from .core.estimators import variables as variables
from .core.folds import Folds as Folds
from .core.folds import SCHEMES as SCHEMES
from .core.folds import check_shapes as check_shapes
from .core.folds import make_folds as make_folds
from .core.gram import Moments as Moments
from .core.gram import by_fold as by_fold
from .core.gram import fit as fit
from .core.gram import inverse_times as inverse_times
from .core.gram import moments as moments
from .core.gram import standardised as standardised
from .core.inference import check_clusters as check_clusters
from .core.inference import over_repeats as over_repeats
from .core.inference import row_weights as row_weights
from .core.inference import solve as solve
from .core.inference import standard_error as standard_error
from .core.layout import Layout as Layout
from .core.layout import group_sums as group_sums
from .core.layout import means as means
from .core.layout import within as within
from .core.learners import crossfit_sklearn as crossfit_sklearn
from .core.learners import follow_folds as follow_folds
from .core.ridge import PolynomialRidge as PolynomialRidge
from .core.ridge import check_learner as check_learner
from .core.ridge import monomials as monomials
from .core.ridge import polynomial as polynomial
from .core.ridge import standardise as standardise
from .dml_panel import ESTIMATORS as ESTIMATORS
from .dml_panel import PanelDML as PanelDML
from .dml_panel import aipw_score as aipw_score
from .dml_panel import plr_score as plr_score
from .experiments.dgp import Simulated as Simulated
from .experiments.dgp import dgp_clarke_polselli_2025 as dgp_clarke_polselli_2025
from .experiments.dgp import dgp_fuhr_papies_2024 as dgp_fuhr_papies_2024
from .experiments.study import ORACLES as ORACLES
from .experiments.study import estimate as estimate
from .experiments.study import monte_carlo as monte_carlo

__all__ = [
    "ESTIMATORS",
    "Fit",
    "Folds",
    "Frame",
    "LINEAR",
    "Layout",
    "Moments",
    "ORACLES",
    "Panel",
    "PanelDML",
    "PolynomialRidge",
    "SCHEMES",
    "SETS",
    "Simulated",
    "aipw_score",
    "by_fold",
    "check_clusters",
    "check_learner",
    "check_shapes",
    "crossfit",
    "crossfit_sklearn",
    "dgp_clarke_polselli_2025",
    "dgp_fuhr_papies_2024",
    "estimate",
    "fit",
    "follow_folds",
    "group_sums",
    "inverse_times",
    "linear_residuals",
    "make_folds",
    "means",
    "moments",
    "monomials",
    "monte_carlo",
    "over_repeats",
    "panel_ols",
    "partial_out",
    "plr_score",
    "polynomial",
    "read_panel",
    "row_weights",
    "solve",
    "standard_error",
    "standardise",
    "standardised",
    "transform",
    "variables",
    "within",
]
