"""Patches of the shipped networks: what the recorded run of the chapter on robust weight signatures compares.

>>> score(0, networks(0)[1]["clean"], "clean", every=20) > 70
True
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor, nn

from ...data import Split, load
from ..baselines.arithmetic import wise_ft
from ..core.loop import State, delta, merge
from ..core.patching import apply
from ..core.units import first, units
from ..rws import compose, signature
from .corrupted import DOMAINS, accuracy, corrupted, deal, family

FOUR = [name for name in DOMAINS if name != "invert"]  # the standard corruptions
LINE = ("signature", "plain difference", "task vector")
PARTS = ("first three", "last three")
RIVALS = (*LINE, *PARTS, "WiSE-FT")
TENTHS = [i / 10 for i in range(1, 11)]
GRID: list[tuple[str, int, float]] = [
    *product(LINE, (3, 5), (0.25, 0.5, 0.75, 1.0, 1.25)),
    *product(PARTS, (3,), [2 * a for a in TENTHS]),
    *product(("WiSE-FT",), (6,), TENTHS),  # all five layers and the head
]


@cache
def networks(seed: int) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """The plain family of a seed: the architecture, and weights by what they were trained on."""
    return family(seed)


@cache
def test_images(name: str, every: int, data: str = "fashion8k") -> Split:
    """Every ``every``-th test image, corrupted."""
    split = corrupted(load(data).test, name)
    return Split(split.x[::every], split.y[::every])


def score(seed: int, state: State, name: str, every: int, data: str = "fashion8k") -> float:
    """Accuracy in % of weights on one kind of test images."""
    return accuracy(networks(seed)[0], state, test_images(name, every, data))


def layers(seed: int) -> list[list[str]]:
    """The five convolutions, each a list of tensor names."""
    return units(networks(seed)[0])


def rho(seed: int, name: str, k: int = 5, project: bool = True) -> dict[str, Tensor]:
    """The signature of a corruption, or the plain difference, in the first ``k`` layers."""
    states = networks(seed)[1]
    return signature(states["start"], states["clean"], states[name], first(layers(seed), k), project=project)


def build(seed: int, name: str, method: str, k: int, strength: float) -> dict[str, Tensor]:
    """The clean network with the patch of a method."""
    states = networks(seed)[1]
    clean = states["clean"]
    if method == "WiSE-FT":
        return merge(clean, [states[name]], wise_ft(strength))
    chosen = [n for unit in layers(seed)[2:] for n in unit] if method == "last three" else first(layers(seed), k)
    if method == "task vector":
        patch = delta(states[name], states["start"], chosen)
    else:
        project = method != "plain difference"
        patch = signature(states["start"], clean, states[name], chosen, project=project)
    return apply(clean, compose([patch], strength=strength))


def held_out(seed: int, count: int) -> Split:
    """Some of the validation images of a family."""
    part = deal(load("fashion8k").train, seed)["validation"]
    return Split(part.x[:count], part.y[:count])


def mixture(seed: int, mix: Sequence[str], strength: float) -> dict[str, Tensor]:
    """The clean network with signatures of several corruptions."""
    return apply(networks(seed)[1]["clean"], compose([rho(seed, name) for name in mix], strength=strength))


def one_projection(seed: int, name: str) -> dict[str, Tensor]:
    """One projection for all tensors of the patch, as one vector."""
    states = networks(seed)[1]
    plain = rho(seed, name, project=False)
    tau = delta(states["clean"], states["start"], list(plain))
    flat = torch.cat([t.flatten() for t in plain.values()])
    along = torch.cat([t.flatten() for t in tau.values()])
    beta = flat @ along / (along @ along)
    return {n: plain[n] - beta * tau[n] for n in plain}


def length(patch: State) -> float:
    """Norm of all tensors together."""
    return float(torch.cat([t.flatten() for t in patch.values()]).norm())


def relative_change(seed: int) -> list[list[float]]:
    """How far each layer of each robust network lies from the clean one, in % of the latter's norm."""
    states = networks(seed)[1]
    clean = {unit[0]: states["clean"][unit[0]] for unit in layers(seed)}  # the convolutions, without biases
    return [[100 * float((states[c][n] - w).norm() / w.norm()) for n, w in clean.items()] for c in DOMAINS]


def change_per_entry(seed: int) -> list[list[float]]:
    """How far an entry of each layer of each robust network lies from the clean one: root mean square, thousandths."""
    states = networks(seed)[1]
    clean = {unit[0]: states["clean"][unit[0]] for unit in layers(seed)}
    return [[1e3 * float((states[c][n] - w).square().mean().sqrt()) for n, w in clean.items()] for c in DOMAINS]


def loaded(model: nn.Module, state: State) -> nn.Module:
    """A copy of the model with other weights."""
    net = copy.deepcopy(model)
    net.load_state_dict(dict(state))
    return net
