# ruff: noqa: I001
# Written by `python -m tools.stubs` from the `__all__` of the modules.
from .adaptformer import AdaptFormer as AdaptFormer
from .adaptformer import branch as branch
from .adaptformer import dead_share as dead_share
from .adaptformer import head as head
from .baselines.hyperformer import HyperNet as HyperNet
from .baselines.hyperformer import Hyperformer as Hyperformer
from .baselines.hyperformer import places as places
from .baselines.lora import LoRA as LoRA
from .baselines.lora import scaling as scaling
from .bone import Bone as Bone
from .bone import bat as bat
from .bone import pool as pool
from .bone import pooled as pooled
from .bone import tiles as tiles
from .core.activations import input_rows as input_rows
from .core.activations import record_inputs as record_inputs
from .core.activations import run as run
from .core.activations import shared_inputs as shared_inputs
from .core.activations import token_mask as token_mask
from .core.adapter import Adapter as Adapter
from .core.adapter import PeftFormat as PeftFormat
from .core.bank import Bank as Bank
from .core.bypass import bypassed as bypassed
from .core.bypass import call_with_taps as call_with_taps
from .core.files import config as config
from .core.files import load as load
from .core.files import save as save
from .core.files import state as state
from .core.host import Host as Host
from .core.injection import activate as activate
from .core.injection import adapters as adapters
from .core.injection import build as build
from .core.injection import inject as inject
from .core.injection import install as install
from .core.injection import merge as merge
from .core.injection import unload as unload
from .core.injection import unmerge as unmerge
from .core.layers import Layer as Layer
from .core.layers import refusal as refusal
from .core.layers import view as view
from .core.layers import width as width
from .core.modes import balanced as balanced
from .core.modes import modes as modes
from .core.phm import PHM as PHM
from .core.phm import Rule as Rule
from .core.phm import phm_linear as phm_linear
from .core.phm import phm_weight as phm_weight
from .core.spectra import Accumulator as Accumulator
from .core.spectra import Moments as Moments
from .core.spectra import Spectrum as Spectrum
from .core.spectra import absorb as absorb
from .core.spectra import agreement as agreement
from .core.switch import Tasks as Tasks
from .core.switch import agreed_names as agreed_names
from .core.targets import by_pattern as by_pattern
from .core.targets import find as find
from .core.targets import frozen_module as frozen_module
from .core.targets import matches as matches
from .core.targets import modules_by_name as modules_by_name
from .core.targets import swap as swap
from .eva import Directions as Directions
from .eva import collect as collect
from .eva import inject_eva as inject_eva
from .eva import redistribute as redistribute
from .eva import start as start
from .experiments.multitask import EVEN as EVEN
from .experiments.multitask import Heads as Heads
from .experiments.multitask import MultiRun as MultiRun
from .experiments.multitask import SUBLAYERS as SUBLAYERS
from .experiments.multitask import TaskToken as TaskToken
from .experiments.multitask import compare_sharing as compare_sharing
from .experiments.multitask import conflict as conflict
from .experiments.multitask import learn as learn
from .experiments.multitask import relabelled as relabelled
from .experiments.transfer import LINEARS as LINEARS
from .experiments.transfer import LRS as LRS
from .experiments.transfer import Run as Run
from .experiments.transfer import SHIFTS as SHIFTS
from .experiments.transfer import Task as Task
from .experiments.transfer import adapt as adapt
from .experiments.transfer import compare as compare
from .experiments.transfer import fresh as fresh
from .experiments.transfer import full as full
from .experiments.transfer import probe as probe
from .experiments.transfer import shifted as shifted
from .experiments.transfer import summary as summary
from .experiments.transfer import trainable as trainable
from .experiments.transfer import update_rank as update_rank
from .hydra import Hydra as Hydra
from .hydra import as_lora as as_lora
from .hydra import save_as_lora as save_as_lora
from .tera import TeRA as TeRA
from .tera import error_terms as error_terms
from .tera import expand as expand
from .tera import multiply as multiply
from .tera import rank_bound as rank_bound
from .tera import rank_one as rank_one
from .tera import update as update
from .tlora import TLoRA as TLoRA
from .tlora import identity_cores as identity_cores
from .tlora import identity_distance as identity_distance
from .tlora import identity_penalty as identity_penalty
from .tlora import orthogonal_penalty as orthogonal_penalty
from .tlora import product as product
from .tlora import ring_factors as ring_factors
from .tlora import ring_matrix as ring_matrix
from .tlora import transform as transform
from .vl_adapter import SHARING as SHARING
from .vl_adapter import Stack as Stack
from .vl_adapter import VLAdapter as VLAdapter
from .vl_adapter import affine as affine
from .vl_adapter import bottleneck as bottleneck

__all__ = [
    "Accumulator",
    "AdaptFormer",
    "Adapter",
    "Bank",
    "Bone",
    "Directions",
    "EVEN",
    "Heads",
    "Host",
    "Hydra",
    "HyperNet",
    "Hyperformer",
    "LINEARS",
    "LRS",
    "Layer",
    "LoRA",
    "Moments",
    "MultiRun",
    "PHM",
    "PeftFormat",
    "Rule",
    "Run",
    "SHARING",
    "SHIFTS",
    "SUBLAYERS",
    "Spectrum",
    "Stack",
    "TLoRA",
    "Task",
    "TaskToken",
    "Tasks",
    "TeRA",
    "VLAdapter",
    "absorb",
    "activate",
    "adapt",
    "adapters",
    "affine",
    "agreed_names",
    "agreement",
    "as_lora",
    "balanced",
    "bat",
    "bottleneck",
    "branch",
    "build",
    "by_pattern",
    "bypassed",
    "call_with_taps",
    "collect",
    "compare",
    "compare_sharing",
    "config",
    "conflict",
    "dead_share",
    "error_terms",
    "expand",
    "find",
    "fresh",
    "frozen_module",
    "full",
    "head",
    "identity_cores",
    "identity_distance",
    "identity_penalty",
    "inject",
    "inject_eva",
    "input_rows",
    "install",
    "learn",
    "load",
    "matches",
    "merge",
    "modes",
    "modules_by_name",
    "multiply",
    "orthogonal_penalty",
    "phm_linear",
    "phm_weight",
    "places",
    "pool",
    "pooled",
    "probe",
    "product",
    "rank_bound",
    "rank_one",
    "record_inputs",
    "redistribute",
    "refusal",
    "relabelled",
    "ring_factors",
    "ring_matrix",
    "run",
    "save",
    "save_as_lora",
    "scaling",
    "shared_inputs",
    "shifted",
    "start",
    "state",
    "summary",
    "swap",
    "tiles",
    "token_mask",
    "trainable",
    "transform",
    "unload",
    "unmerge",
    "update",
    "update_rank",
    "view",
    "width",
]
