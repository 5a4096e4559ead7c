# ruff: noqa: I001
# Written by `python -m tools.stubs` from the `__all__` of the modules.
from .baselines.bn_adapt import BNAdapt as BNAdapt
from .baselines.tent import Tent as Tent
from .baselines.tent import entropy as entropy
from .core.adapted import Adapted as Adapted
from .core.adapted import Learning as Learning
from .core.adapted import OptimizerFactory as OptimizerFactory
from .core.adapted import adapting as adapting
from .core.adapted import batch_norms as batch_norms
from .core.adapted import freeze as freeze
from .core.adapted import gradient_step as gradient_step
from .core.adapted import norm_affine as norm_affine
from .core.adapted import use_batch_statistics as use_batch_statistics
from .core.called import check_called as check_called
from .core.copies import own_copy as own_copy
from .core.graphs import Neighbours as Neighbours
from .core.graphs import affinity as affinity
from .core.views import RandomViews as RandomViews
from .core.views import View as View
from .core.views import apply_view as apply_view
from .core.views import draw_view as draw_view
from .cotta import CoTTA as CoTTA
from .cotta import confidence as confidence
from .cotta import consistency_loss as consistency_loss
from .cotta import ema as ema
from .cotta import restoration_mask as restoration_mask
from .cotta import restore as restore
from .experiments.evaluate import Run as Run
from .experiments.evaluate import drift as drift
from .experiments.evaluate import error_by_domain as error_by_domain
from .experiments.evaluate import mean_error as mean_error
from .experiments.evaluate import mean_recall as mean_recall
from .experiments.evaluate import run as run
from .experiments.evaluate import run_seeds as run_seeds
from .experiments.evaluate import running_error as running_error
from .experiments.evaluate import summary as summary
from .lame import Assignment as Assignment
from .lame import LAME as LAME
from .lame import energy as energy
from .lame import laplacian_assign as laplacian_assign
from .lame import vote_update as vote_update

__all__ = [
    "Adapted",
    "Assignment",
    "BNAdapt",
    "CoTTA",
    "LAME",
    "Learning",
    "Neighbours",
    "OptimizerFactory",
    "RandomViews",
    "Run",
    "Tent",
    "View",
    "adapting",
    "affinity",
    "apply_view",
    "batch_norms",
    "check_called",
    "confidence",
    "consistency_loss",
    "draw_view",
    "drift",
    "ema",
    "energy",
    "entropy",
    "error_by_domain",
    "freeze",
    "gradient_step",
    "laplacian_assign",
    "mean_error",
    "mean_recall",
    "norm_affine",
    "own_copy",
    "restoration_mask",
    "restore",
    "run",
    "run_seeds",
    "running_error",
    "summary",
    "use_batch_statistics",
    "vote_update",
]
