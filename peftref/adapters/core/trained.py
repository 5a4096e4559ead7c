"""Modules that are trained beside an adapter, such as a new head: PEFT's ``modules_to_save``.

>>> from torch import nn
>>> from peftref.adapters.baselines.lora import LoRA
>>> from peftref.adapters.core.injection import inject
>>> net = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
>>> _ = inject(net, LoRA, ["body"], r=1)
>>> trained(net)
{}
>>> _ = net["head"].requires_grad_()
>>> {name: list(tensors) for name, tensors in trained(net).items()}
{'head': ['weight', 'bias']}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .host import Host
from .targets import frozen_module, modules_by_name

PREFIX = "base_model.model."  # what PEFT's two wrappers put in front of every name


def trained(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Modules of which a parameter asks for a gradient, outside of the adapters: each with its own tensors.

    Raises:
        ValueError: such a parameter in an adapted layer or of the model itself, where a file has no place for it.
    """
    found = {}
    astray = []
    for n, m in modules_by_name(model).items():
        own = frozen_module(m)._parameters
        asking = [key for key, p in own.items() if p is not None and p.requires_grad]
        if asking and n and not isinstance(m, Host):
            found[n] = _tensors(m)
        else:
            astray += [f"{n}.{key}" if n else key for key in asking]
    if astray:
        raise ValueError(
            f"model: expected trained parameters in adapters or in modules without one, got {', '.join(astray)}; "
            "freeze them, or name the modules that go along"
        )
    return found


def kept(model: nn.Module, modules: Iterable[str] | None) -> dict[str, dict[str, Tensor]]:
    """The modules named and what is in them, each with its own tensors; with None, those that are :func:`trained`.

    Raises:
        TypeError: no names.
        ValueError: a name that no module has, or of an adapted one.
    """
    if modules is None:
        return trained(model)
    names = [] if isinstance(modules, str) or not isinstance(modules, Iterable) else list(modules)
    if (not names and modules != [] and modules != ()) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"modules: expected names of modules, or None, got {modules!r}")
    have = modules_by_name(model)
    unknown = [n for n in names if n not in have or not n or isinstance(have[n], Host)]
    if unknown:
        plain = [n for n, m in have.items() if n and not isinstance(m, Host)]
        raise ValueError(f"modules: expected names of modules without adapters, among {plain}, got {unknown}")
    inside = {n for n in have if any(n == name or n.startswith(name + ".") for name in names)}
    own = {n: _tensors(m) for n, m in have.items() if n and not isinstance(m, Host)}
    mine = {id(t) for n in inside & own.keys() for t in own[n].values()}  # what shares a weight with them goes along
    return {n: tensors for n, tensors in own.items() if mine & {id(t) for t in tensors.values()}}


def keyed(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of some modules, under PEFT's names."""
    return {f"{PREFIX}{n}.{key}": t for n, tensors in modules.items() for key, t in tensors.items()}


def listed(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names as PEFT takes them, which are ends of names: where one ends another module's too, the whole path."""
    others = [f"{PREFIX}{n}" for n in modules_by_name(model) if n]
    return [n if sum(other.endswith(n) for other in others) == 1 else f"{PREFIX}{n}" for n in names]


def saved_places(model: nn.Module, ends: Iterable[str]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """For each of PEFT's ``modules_to_save`` that the model has: the modules meant and in them, and their tensors."""
    have = modules_by_name(model)
    found = {}
    for end in ends:
        roots = [n for n in have if n and f"{PREFIX}{n}".endswith(end)]
        inside = [n for n in have if any(n == root or n.startswith(root + ".") for root in roots)]
        if roots:
            found[end] = {n: _tensors(have[n]) for n in inside if not isinstance(have[n], Host)}
    return found


def shared_with(model: nn.Module, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These places and all others that are the same tensors (a tied head), under PEFT's names."""
    mine = {id(place) for place in places.values()}
    every = keyed({n: _tensors(frozen_module(m)) for n, m in modules_by_name(model).items() if n})
    return {**places, **{key: t for key, t in every.items() if id(t) in mine}}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and those of its buffers that are state."""
    every: Mapping[str, Tensor | None] = {**module._parameters, **module._buffers}
    passing = module._non_persistent_buffers_set
    return {key: t for key, t in every.items() if t is not None and key not in passing}
