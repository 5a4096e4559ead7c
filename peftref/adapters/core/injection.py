"""Put adapters into any model, in place; switch, merge and undo them.

Each function names what is wrong before it changes anything. What the methods have in common, and why merging and
undoing are exact, is in :mod:`peftref.adapters.core.adapter`; files are in :mod:`peftref.adapters.core.files`.

>>> import torch
>>> from torch import nn
>>> from peftref.adapters.baselines.lora import LoRA
>>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
>>> inject(net, LoRA, ["0", "2"], name="french", r=2)
['0', '2']
>>> inject(net, LoRA, r"2", name="german", r=1)           # now this one is used and trained, "french" is not
['2']
>>> activate(net, "french", "german")                     # both: their increments add
>>> merge(net)                                            # into the weights; and back, every bit
>>> unmerge(net)
>>> inject(net, LoRA, ["fc"], name="third")
Traceback (most recent call last):
ValueError: targets: expected names of layers, of which there are ['0', '2'], got ['fc']
>>> unload(net)                                           # as it was
>>> net[2]
Linear(in_features=8, out_features=2, bias=True)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from ._calls import WITHOUT_NUMBERS, is_bare, on_meta
from ._pretrained import protect
from .adapter import Adapter
from .host import Host
from .layers import view
from .targets import find, modules_by_name, swap

__all__ = ["activate", "adapters", "build", "inject", "install", "merge", "unload", "unmerge"]


def inject(
    model: nn.Module,
    kind: type[Adapter],
    targets: str | Iterable[str],
    *,
    name: str = "default",
    exclude: str | Iterable[str] = (),
    per_layer: Mapping[str, Mapping[str, Any] | None] | None = None,
    freeze: bool = True,
    **options: Any,
) -> list[str]:
    """Put a new adapter on layers of the model, in place; it becomes the one that is active.

    A layer that the model has in several places gets one adapter, and is replaced in all of them; PEFT replaces the
    first alone. Files go both ways, but the models then differ.

    Args:
        model: any module.
        kind: the method, such as :class:`~peftref.adapters.baselines.lora.LoRA`.
        targets: names of layers or ends of names (``["q_proj", "v_proj"]``), a regular expression for the whole name,
            or ``"all-linear"``: every ``Linear`` and ``Conv1D`` but the output layer of a transformers model.
        name: of the adapter; a model can have several.
        exclude: names, ends of names or a regular expression of layers to leave alone.
        per_layer: options of single layers, by full name; None leaves that layer alone.
        freeze: all weights that the model has so far, so that only adapters train. Unfreeze a head, or biases,
            afterwards. With False all stay as they are, those of adapted layers too.
        options: of the method.

    Returns:
        The full names of the adapted layers.

    Raises:
        TypeError: ``kind`` is no adapter, a layer is of a type that the method cannot use, or an unknown option.
        ValueError: one of the names is no layer's; one is used without being called (as in ``MultiheadAttention``), or
            its weights are on the meta device; ``per_layer`` names a layer that is not adapted; the name is taken or
            not usable; or the method refuses an option.
        RuntimeError: the model is merged.
    """
    new = build(model, kind, targets, exclude=exclude, per_layer=per_layer, **options)
    install(model, new, name, freeze=freeze)
    return list(new)


def build(
    model: nn.Module,
    kind: type[Adapter],
    targets: str | Iterable[str],
    *,
    exclude: str | Iterable[str] = (),
    per_layer: Mapping[str, Mapping[str, Any] | None] | None = None,
    **options: Any,
) -> dict[str, Adapter]:
    """The adapters that :func:`inject` would put in, by layer; the model does not change."""
    if not (isinstance(kind, type) and issubclass(kind, Adapter)):
        raise TypeError(f"kind: expected a class of adapters, got {kind!r}")
    _refuse_merged(_hosts(model))
    layers = find(model, targets, exclude, any_module=kind.any_module)
    own = dict(per_layer or {})
    unknown = [n for n in own if n not in layers]
    if unknown:
        raise ValueError(f"per_layer: expected names among {list(layers)}, got {unknown}")
    only_shapes = all(p.is_meta for p in model.parameters())  # a model for its shapes alone
    offloaded = [n for n, module in layers.items() if on_meta(module) and not (only_shapes and is_bare(module))]
    if offloaded:
        raise ValueError(
            f"targets: expected layers with their weights in memory, got {offloaded} with {WITHOUT_NUMBERS}"
        )
    made: dict[str, Adapter] = {}
    for n, module in layers.items():
        mine = own.get(n, {})
        if mine is None:
            continue
        base = view(module)
        like = next(module.parameters(), torch.empty(0))
        made[n] = kind(base, **{**options, **mine}).to(like.device, base.dtype).train(module.training)
    if not made:
        raise ValueError("per_layer: expected at least one layer to adapt, got None for all")
    return made


def install(model: nn.Module, new: Mapping[str, Adapter], name: str = "default", *, freeze: bool = True) -> None:
    """Put adapters of :func:`build`, which may have been changed since, into the model they were built for."""
    modules = modules_by_name(model)
    hosts = _hosts(model)
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name: expected a name without dots that is no attribute of a ModuleDict, got {name!r}")
    if not isinstance(new, Mapping) or not new or not all(isinstance(a, Adapter) for a in new.values()):
        raise TypeError(f"new: expected some adapters, by the layer they are for, got {new!r}")
    unknown = [n for n in new if n not in modules]
    if unknown:
        raise ValueError(f"new: expected names of layers of the model, got {unknown}")
    if any(name in host.adapters for host in hosts.values()):
        raise ValueError(f"name: expected a new one, got {name!r}, which the model has")
    _refuse_merged(hosts)
    if freeze:
        model.requires_grad_(False)
    fresh = {n: Host(modules[n]) for n in new if not isinstance(modules[n], Host)}
    for n, adapter in new.items():
        (fresh.get(n) or hosts[n]).adapters[name] = adapter
    swap(model, {id(modules[n]): host for n, host in fresh.items()})
    activate(model, name)
    protect(model)


def adapters(model: nn.Module, name: str = "default") -> dict[str, Adapter]:
    """The adapters of one name, by the layer they are on.

    Raises:
        ValueError: the model has none of that name.
    """
    hosts = _hosts(model)
    found = {n: cast(Adapter, host.adapters[name]) for n, host in hosts.items() if name in host.adapters}
    if not found:
        raise ValueError(f"name: expected one of {_names(hosts)}, got {name!r}")
    return found


def activate(model: nn.Module, *names: str) -> None:
    """Use and train exactly these adapters, their increments added; without a name, the frozen model.

    Raises:
        ValueError: a name that the model does not have.
        RuntimeError: the model is merged.
    """
    hosts = _hosts(model)
    unknown = [n for n in names if n not in _names(hosts)]
    if unknown:
        raise ValueError(f"names: expected some of {_names(hosts)}, got {unknown}")
    _refuse_merged(hosts)
    for host in hosts.values():
        host.active = [n for n in dict.fromkeys(names) if n in host.adapters]
        for n, adapter in host.adapters.items():
            adapter.requires_grad_(n in host.active)


def merge(model: nn.Module) -> None:
    """Add the active adapters to the weights, in place, so that the model is as fast as it was.

    Sums are taken in float32 or wider and rounded once. The frozen parameters are put aside, not copied; a layer whose
    weight another one shares (a tied head) gets a weight of its own, and the other keeps the frozen one.

    Raises:
        ValueError: no adapter is active; a merged weight would not be finite, or a frozen one is on the meta device; or
            a frozen layer has hooks of its own (``module.base_layer``), which may change what it gets or gives: they
            act on ``y0`` alone before merging and on the sum after it. On the module itself they may stay.
        TypeError: an active adapter is not linear.
        RuntimeError: the model is merged already.
    """
    hosts = _hosts(model)
    _refuse_merged(hosts)
    todo = {n: host for n, host in hosts.items() if host.active}
    if not todo:
        raise ValueError(f"model: expected active adapters to merge, got none of {_names(hosts)}")
    for n, host in todo.items():
        fixed = [a for a in host.active if not host.adapters[a].mergeable]
        if fixed:
            raise TypeError(f"model: expected linear adapters, got {host.adapters[fixed[0]].kind} on {n}")
    for n, host in todo.items():
        host.check_mergeable(n)
    folded = {n: host.fold() for n, host in todo.items()}
    broken = [n for n, both in folded.items() if not all(t is None or t.isfinite().all() for t in both)]
    if broken:
        raise ValueError(f"model: expected finite merged weights, got others in {broken}")
    for n, host in todo.items():
        host.put(*folded[n])


def unmerge(model: nn.Module) -> None:
    """Put the frozen parameters back, the same objects with the same bits.

    Raises:
        RuntimeError: the model is not merged.
    """
    hosts = _hosts(model)
    if not any(host.merged for host in hosts.values()):
        raise RuntimeError("model: expected a merged model to unmerge, got one that is not merged")
    for host in hosts.values():
        host.restore()


def unload(model: nn.Module, *, merged: bool = False) -> None:
    """Take all adapters out, in place: the modules that were there before stand where they stood, frozen.

    Args:
        model: with adapters; merged or not.
        merged: keep the merged weights, merging first if need be, instead of going back to the frozen ones.

    Raises:
        ValueError: the model has no adapters, or as in :func:`merge`.
        TypeError: as in :func:`merge`.
    """
    hosts = _hosts(model)
    if not hosts:
        raise ValueError("model: expected one with adapters, got none")
    if not merged:
        for host in hosts.values():
            host.restore()
    elif not any(host.merged for host in hosts.values()):
        merge(model)
    swap(model, {id(host): host.base_layer for host in hosts.values()})
    protect(model)


def _hosts(model: nn.Module) -> dict[str, Host]:
    return {n: module for n, module in modules_by_name(model).items() if isinstance(module, Host)}


def _names(hosts: Mapping[str, Host]) -> list[str]:
    return list(dict.fromkeys(name for host in hosts.values() for name in host.adapters))


def _refuse_merged(hosts: Mapping[str, Host]) -> None:
    if any(host.merged for host in hosts.values()):
        raise RuntimeError("model: expected one that is not merged, got a merged one; unmerge it first")
