# ruff: noqa: I001
# Written by `python -m tools.stubs` from the `__all__` of the modules.
from .adab2n import AdaB2N as AdaB2N
from .adab2n import adaptation_loss as adaptation_loss
from .adab2n import balance as balance
from .adab2n import begin_task as begin_task
from .adab2n import convert as convert
from .adab2n import eta as eta
from .adab2n import parameter_groups as parameter_groups
from .adab2n import task_batch as task_batch
from .adab2n import task_weights as task_weights
from .baselines.ewc import EWC as EWC
from .baselines.ewc import diagonal_fisher as diagonal_fisher
from .baselines.ewc import ewc_penalty as ewc_penalty
from .baselines.norms import continual_norm as continual_norm
from .baselines.norms import group_norm as group_norm
from .baselines.norms import replace_batch_norms as replace_batch_norms
from .baselines.rehearsal import DERpp as DERpp
from .baselines.rehearsal import ER as ER
from .baselines.rehearsal import ERACE as ERACE
from .baselines.rehearsal import ace_mask as ace_mask
from .baselines.rehearsal import derpp_loss as derpp_loss
from .baselines.rehearsal import er_ace_loss as er_ace_loss
from .baselines.rehearsal import er_loss as er_loss
from .classp import CLASSP as CLASSP
from .classp import classp_step as classp_step
from .classp import gate as gate
from .core.balanced_norm import balanced_norm as balanced_norm
from .core.balanced_norm import balanced_statistics as balanced_statistics
from .core.film import EFFICIENTNET as EFFICIENTNET
from .core.film import FiLM as FiLM
from .core.film import film_parameters as film_parameters
from .core.film import inject_film as inject_film
from .core.film import merge_film as merge_film
from .core.film import remove_film as remove_film
from .core.growing_head import DynamicHead as DynamicHead
from .core.growing_head import local_loss as local_loss
from .core.lda import LDA as LDA
from .core.lda import Moments as Moments
from .core.lda import discriminant as discriminant
from .core.lda import merge as merge
from .core.lda import moments as moments
from .core.metrics import average_accuracy as average_accuracy
from .core.metrics import average_incremental as average_incremental
from .core.metrics import backward_transfer as backward_transfer
from .core.metrics import evaluate as evaluate
from .core.metrics import forgetting as forgetting
from .core.metrics import forward_transfer as forward_transfer
from .core.metrics import last_accuracy as last_accuracy
from .core.metrics import plasticity as plasticity
from .core.metrics import summary as summary
from .core.prefix import AttentionHost as AttentionHost
from .core.prefix import Prefix as Prefix
from .core.prefix import heads as heads
from .core.prefix import inject_prefix as inject_prefix
from .core.prefix import prefix_attention as prefix_attention
from .core.prefix import prefix_share as prefix_share
from .core.replay import Reservoir as Reservoir
from .core.rule import FineTune as FineTune
from .core.small_modules import Experts as Experts
from .core.small_modules import KVLoRA as KVLoRA
from .core.small_modules import ParallelAdapter as ParallelAdapter
from .core.streams import Task as Task
from .core.streams import class_incremental as class_incremental
from .core.streams import domain_incremental as domain_incremental
from .core.streams import task_of as task_of
from .core.train import joint as joint
from .core.train import learn as learn
from .fsa import FSA as FSA
from .fsa import cosine_distance as cosine_distance
from .fsa import embed as embed
from .fsa import first_session as first_session
from .lae import LAE as LAE
from .lae import alpha_for as alpha_for
from .lae import ema_ as ema_
from .lae import vote as vote

__all__ = [
    "AdaB2N",
    "AttentionHost",
    "CLASSP",
    "DERpp",
    "DynamicHead",
    "EFFICIENTNET",
    "ER",
    "ERACE",
    "EWC",
    "Experts",
    "FSA",
    "FiLM",
    "FineTune",
    "KVLoRA",
    "LAE",
    "LDA",
    "Moments",
    "ParallelAdapter",
    "Prefix",
    "Reservoir",
    "Task",
    "ace_mask",
    "adaptation_loss",
    "alpha_for",
    "average_accuracy",
    "average_incremental",
    "backward_transfer",
    "balance",
    "balanced_norm",
    "balanced_statistics",
    "begin_task",
    "class_incremental",
    "classp_step",
    "continual_norm",
    "convert",
    "cosine_distance",
    "derpp_loss",
    "diagonal_fisher",
    "discriminant",
    "domain_incremental",
    "ema_",
    "embed",
    "er_ace_loss",
    "er_loss",
    "eta",
    "evaluate",
    "ewc_penalty",
    "film_parameters",
    "first_session",
    "forgetting",
    "forward_transfer",
    "gate",
    "group_norm",
    "heads",
    "inject_film",
    "inject_prefix",
    "joint",
    "last_accuracy",
    "learn",
    "local_loss",
    "merge",
    "merge_film",
    "moments",
    "parameter_groups",
    "plasticity",
    "prefix_attention",
    "prefix_share",
    "remove_film",
    "replace_batch_norms",
    "summary",
    "task_batch",
    "task_of",
    "task_weights",
    "vote",
]
