"""Save and load adapters in the layout of Hugging Face PEFT: ``adapter_model.safetensors``, ``adapter_config.json``.

A method that PEFT has too (LoRA) is opened by ``PeftModel.from_pretrained``, and what PEFT saved is opened here. Other
methods have the same layout under their own names. Loading is all or nothing: every tensor of the file must have its
place and every place its tensor, and an option of PEFT that is not implemented here raises instead of being dropped.

>>> import tempfile, torch
>>> from torch import nn
>>> from peftref.adapters.core.injection import inject
>>> from peftref.adapters.baselines.lora import LoRA
>>> a, b = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)) for _ in range(2))
>>> inject(a, LoRA, ["0", "1"], r=2)
['0', '1']
>>> with tempfile.TemporaryDirectory() as folder:
...     save(a, folder)
...     load(b, folder, name="from_a")
['0', '1']
>>> list(state(a))[:2]
['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..._replacing import replacing
from .adapter import Adapter
from .formats import CONFIG, WEIGHTS, by_layer, method, misfits, options_of, read_files, written
from .host import Host
from .injection import adapters, build, install
from .targets import exactly, find, frozen_module, modules_by_name
from .trained import PREFIX, kept, keyed, listed, saved_places, shared_with

__all__ = ["config", "load", "save", "state"]


def state(model: nn.Module, name: str = "default", *, modules: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of the adapter, and of the modules trained beside it, under PEFT's names: copies on the CPU.

    A tensor that layers share is there once.

    Args:
        model: with adapters; compiled, parallel or not, the names are those without such wrappers.
        name: of the adapter.
        modules: as in :func:`save`.
    """
    return {key: t.detach().cpu().contiguous().clone() for key, t in _all(model, name, modules).items()}


def config(model: nn.Module, name: str = "default", *, modules: Iterable[str] | None = None) -> dict[str, Any]:
    """The adapter's configuration as PEFT writes it; what differs by layer is in ``rank_pattern`` and the like.

    Args:
        model: as in :func:`state`.
        name: of the adapter.
        modules: as in :func:`save`.

    Raises:
        ValueError: no such adapter, or layers that differ in an option that PEFT has for all of them together; or as
            in :func:`save`.
    """
    found = adapters(model, name)
    kind = type(next(iter(found.values())))
    each = {n: {option: getattr(a, option) for option in kind.options} for n, a in found.items()}
    values = {option: [own[option] for own in each.values()] for option in kind.options}
    common = {option: max(of, key=of.count) for option, of in values.items()}
    patterns: dict[str, dict[str, Any]] = {pattern: {} for pattern in kind.peft.patterns.values()}
    per_layer: dict[str, dict[str, Any]] = {}
    for n, own in each.items():
        for option in (o for o in kind.options if own[o] != common[o]):
            if option in kind.peft.patterns:
                patterns[kind.peft.patterns[option]]["^" + re.escape(n)] = own[option]
            elif kind.peft.patterns:
                raise ValueError(f"{option}: expected one value for all layers, as in PEFT, got {own[option]} on {n}")
            else:
                per_layer.setdefault(n, {})[option] = own[option]
    targets: list[str] | str = list(found)
    layers = find(model, targets, any_module=True)
    if list(layers) != list(found):  # a name that ends another layer's: be exact
        targets = exactly(found)
        layers = find(model, targets, any_module=True)
    layout: dict[str, Any] = {"fan_in_fan_out": _transposed(layers.values())} if kind.peft.patterns else {}
    if per_layer:
        layout["per_layer"] = per_layer
    beside = listed(model, kept(model, modules))
    if beside:
        layout["modules_to_save"] = beside
    return {"target_modules": targets, "inference_mode": True, **written(kind, common), **patterns, **layout}


def save(model: nn.Module, path: str | Path, name: str = "default", *, modules: Iterable[str] | None = None) -> None:
    """Write one adapter to a folder, which is made if need be. The model may be merged; it does not change.

    Modules trained beside the adapter, such as a new head, go along, whole, as PEFT's ``modules_to_save``.

    Args:
        model: as in :func:`state`.
        path: the folder.
        name: of the adapter.
        modules: names of the modules that go along; by default those with a parameter that asks for a gradient now,
            so name a head that has been frozen since. ``()`` for none. (One that holds adapted layers opens here, but
            PEFT would copy it whole.)

    Raises:
        ValueError: no such adapter, an unknown module, or a parameter that asks for a gradient and that no file has a
            place for: of an adapted layer, or of the model itself; or as in :func:`config`.
        TypeError: ``modules`` that are no names.
    """
    write_files(path, _all(model, name, modules), config(model, name, modules=modules))


def load(model: nn.Module, path: str | Path, name: str = "default", *, freeze: bool = True, **extra: Any) -> list[str]:
    """Put a saved adapter, of ours or of PEFT, into the model under a name of your choice; it becomes active.

    Modules that were saved with it (PEFT's ``modules_to_save``: a head) replace the model's own weights, in place, and
    are trained with the adapter. A model has them once, whichever adapter is active.

    Args:
        model: of the architecture that the adapter was made for; compiled, parallel or not.
        path: the folder.
        name: any that the model does not have.
        freeze: as in :func:`~peftref.adapters.core.injection.inject`.
        extra: arguments of the method that no file keeps, such as a shared bank.

    Returns:
        The full names of the adapted layers, without wrappers.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: an unknown method, an option of PEFT that is not implemented or of another type; tensors that are
            missing, too many, of another shape or type, or not finite; modules beside the adapter other than those
            that the model's present adapters go with; or as in
            :func:`~peftref.adapters.core.injection.inject`.
    """
    spec, tensors = read_files(path)
    kind = method(spec)
    options = options_of(kind, spec)
    targets: Any = spec.get("target_modules")
    tensors = {_now(key, kind): t for key, t in tensors.items()}
    exclude = spec.get("exclude_modules") or ()
    layers = find(model, targets, exclude, any_module=kind.any_module, all_names=False)  # its tensors say all
    if spec.get("fan_in_fan_out") and not _transposed(layers.values()):
        raise ValueError("fan_in_fan_out: expected False for a model without Conv1D layers, got True")
    own = by_layer(kind, spec, layers)
    new = build(model, kind, exactly(layers), per_layer=own, **options, **extra)
    ends = spec.get("modules_to_save") or []
    made = {n: adapter for n, adapter in new.items() if not (_beside(n, ends) and _untold(n, adapter, tensors))}
    places = _tensors(made)
    beside = saved_places(model, ends)
    heads = keyed({n: of for modules in beside.values() for n, of in modules.items()})
    heads = {key: place for key, place in heads.items() if key in tensors}
    ties = shared_with(model, heads)
    heads = {key: place for key, place in ties.items() if key in tensors}
    found = {
        "missing": sorted([*(places.keys() - tensors.keys()), *_left_out(beside, tensors)]),
        "unexpected": sorted(tensors.keys() - places.keys() - heads.keys() - _of_the_base(model, tensors)),
        **misfits({**places, **heads}, tensors),
    }
    if any(found.values()):
        lists = "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names)
        raise ValueError(f"path: expected the tensors of its configuration on this model; {lists}")
    _check_heads(model, heads, tensors, ties=() if spec.get("ensure_weight_tying") else ties)
    install(model, made, name, freeze=freeze)
    with torch.no_grad():
        for key, place in {**places, **heads}.items():
            place.copy_(tensors[key])
    for place in heads.values():
        place.requires_grad_(isinstance(place, nn.Parameter) and place.is_floating_point())
    return list(made)


def write_files(path: str | Path, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
    """Write the two files in PEFT's layout.

    Args:
        path: a folder, which is made if need be.
        tensors: by PEFT's names.
        spec: the configuration.
    """
    folder = Path(path)
    text = json.dumps(spec, indent=2, sort_keys=True)
    copies = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}  # no views, no shared memory
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG) as new_config, replacing(folder / WEIGHTS) as new_weights:  # both before either
        save_file(copies, new_weights, metadata={"format": "pt"})
        new_config.write_text(text + "\n", encoding="utf-8")


def _all(model: nn.Module, name: str, modules: Iterable[str] | None) -> dict[str, Tensor]:
    return {**_tensors(adapters(model, name)), **keyed(kept(model, modules))}


def _tensors(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """By PEFT's names, those that layers share under the first; the adapters' own tensors."""
    first: dict[int, tuple[str, Tensor]] = {}
    for n, adapter in found.items():
        for key, t in adapter.state_dict(keep_vars=True).items():
            first.setdefault(id(t), (f"{PREFIX}{n}.{key}", t))
    return dict(first.values())


def _now(key: str, kind: type[Adapter]) -> str:
    """Our name of a tensor that older files call otherwise."""
    return next((key.removesuffix(old) + new for old, new in kind.peft.renamed.items() if key.endswith(old)), key)


def _beside(name: str, ends: Iterable[str]) -> bool:
    """PEFT's rule: a layer in a module that is saved whole gets no adapter."""
    return any(re.match(rf"(^|.*\.){re.escape(end)}($|\..*)", name) for end in ends)


def _untold(name: str, adapter: Adapter, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file has nothing of this adapter."""
    return not _tensors({name: adapter}).keys() & tensors.keys()


def _left_out(beside: Mapping[str, Mapping[str, Mapping[str, Tensor]]], tensors: Mapping[str, Tensor]) -> list[str]:
    """What a file does not have of the modules that it says it has."""
    missing = [f"{PREFIX}{end}" for end, modules in beside.items() if not keyed(modules).keys() & tensors.keys()]
    for n, of in {n: of for modules in beside.values() for n, of in modules.items()}.items():
        own = keyed({n: of})
        if own.keys() & tensors.keys():
            missing += [key for key, t in own.items() if isinstance(t, nn.Parameter) and key not in tensors]
    return missing


def _of_the_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """PEFT may write an adapted head's frozen weight beside its adapter: harmless where it is this model's own."""
    own = {
        f"{PREFIX}{n}.{inside}{key}": p
        for n, module in modules_by_name(model).items()
        for key, p in frozen_module(module).named_parameters(recurse=False)
        for inside in ("", "base_layer.")
    }
    return {key for key, t in tensors.items() if key in own and torch.equal(t, own[key].detach().cpu().to(t.dtype))}


def _check_heads(
    model: nn.Module, heads: Mapping[str, Tensor], tensors: Mapping[str, Tensor], ties: Iterable[str]
) -> None:
    """One place cannot hold two heads: of layers that share a weight, or of adapters that are there already."""
    changed = [k for k, p in heads.items() if not torch.equal(p.detach().cpu(), tensors[k].to(p.dtype))]
    first: dict[int, str] = {}
    for key, place in heads.items():
        other = first.setdefault(id(place), key)
        if not torch.equal(tensors[other], tensors[key]):
            raise ValueError(f"model: expected a weight for each of {other} and {key}, got one that they share")
    tied = [key for key in ties if key not in heads] if changed else []
    if tied:
        raise ValueError(f"model: expected a weight of its own for {', '.join(tied)}, got one that the file replaces")
    if changed and any(isinstance(m, Host) for m in modules_by_name(model).values()):
        raise ValueError(
            "modules_to_save: expected the weights that the adapters of this model go with, got others for "
            f"{', '.join(changed)}; unload those adapters, or use another copy of the model"
        )


def _transposed(layers: Iterable[nn.Module]) -> bool:
    """PEFT wants to be told of ``Conv1D``, which keeps its weight transposed."""
    return any(type(layer).__name__ == "Conv1D" for layer in layers)
