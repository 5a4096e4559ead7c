# ruff: noqa: I001
# Written by `python -m tools.stubs` from the `__all__` of the modules.
from .bang import bang_loss as bang_loss
from .bang import calibration_error as calibration_error
from .bang import confidence as confidence
from .bang import fine_tune as fine_tune
from .bang import mixup as mixup
from .bang import outcomes as outcomes
from .bang import smooth as smooth
from .bang import soft_cross_entropy as soft_cross_entropy
from .baselines.arithmetic import average as average
from .baselines.arithmetic import dare as dare
from .baselines.arithmetic import fisher_wise_ft as fisher_wise_ft
from .baselines.arithmetic import linear as linear
from .baselines.arithmetic import task_arithmetic as task_arithmetic
from .baselines.arithmetic import wise_ft as wise_ft
from .baselines.ties import ties as ties
from .baselines.ties import trim_thresholds as trim_thresholds
from .core.batchnorm import batchnorms as batchnorms
from .core.batchnorm import recalibrate as recalibrate
from .core.checkpoints import Checkpoint as Checkpoint
from .core.checkpoints import merge_checkpoints as merge_checkpoints
from .core.loop import Rule as Rule
from .core.loop import State as State
from .core.loop import check_aligned as check_aligned
from .core.loop import delta as delta
from .core.loop import elementwise as elementwise
from .core.loop import fill as fill
from .core.loop import merge as merge
from .core.loop import upcast as upcast
from .core.patching import Patched as Patched
from .core.patching import apply as apply
from .core.quantise import Quantised as Quantised
from .core.quantise import quantise as quantise
from .core.units import first as first
from .core.units import units as units
from .experiments.colournets import ColourNets as ColourNets
from .experiments.colournets import distinct as distinct
from .experiments.colournets import hits as hits
from .experiments.colournets import scenes as scenes
from .experiments.colournets import train as train
from .experiments.corrupted import Corrupting as Corrupting
from .experiments.corrupted import DOMAINS as DOMAINS
from .experiments.corrupted import accuracy as accuracy
from .experiments.corrupted import corrupted as corrupted
from .experiments.corrupted import deal as deal
from .experiments.corrupted import family as family
from .experiments.multicolor import COLOURS as COLOURS
from .experiments.multicolor import MultiColor as MultiColor
from .experiments.multicolor import colour_maps as colour_maps
from .experiments.multicolor import multicolor as multicolor
from .experiments.spurious import Simulation as Simulation
from .experiments.spurious import imbalance_gain as imbalance_gain
from .experiments.spurious import margin_ose as margin_ose
from .experiments.spurious import margin_single as margin_single
from .experiments.spurious import margin_wse as margin_wse
from .experiments.spurious import simulate as simulate
from .experiments.spurious import spurious_accuracy as spurious_accuracy
from .rws import average_batchnorm as average_batchnorm
from .rws import blend_statistics as blend_statistics
from .rws import compose as compose
from .rws import signature as signature

__all__ = [
    "COLOURS",
    "Checkpoint",
    "ColourNets",
    "Corrupting",
    "DOMAINS",
    "MultiColor",
    "Patched",
    "Quantised",
    "Rule",
    "Simulation",
    "State",
    "accuracy",
    "apply",
    "average",
    "average_batchnorm",
    "bang_loss",
    "batchnorms",
    "blend_statistics",
    "calibration_error",
    "check_aligned",
    "colour_maps",
    "compose",
    "confidence",
    "corrupted",
    "dare",
    "deal",
    "delta",
    "distinct",
    "elementwise",
    "family",
    "fill",
    "fine_tune",
    "first",
    "fisher_wise_ft",
    "hits",
    "imbalance_gain",
    "linear",
    "margin_ose",
    "margin_single",
    "margin_wse",
    "merge",
    "merge_checkpoints",
    "mixup",
    "multicolor",
    "outcomes",
    "quantise",
    "recalibrate",
    "scenes",
    "signature",
    "simulate",
    "smooth",
    "soft_cross_entropy",
    "spurious_accuracy",
    "task_arithmetic",
    "ties",
    "train",
    "trim_thresholds",
    "units",
    "upcast",
    "wise_ft",
]
