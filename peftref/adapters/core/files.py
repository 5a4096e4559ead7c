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

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..._replacing import replacing
from .adapter import KINDS, Adapter
from .injection import adapters, build, install
from .targets import by_pattern, find, frozen_module, modules_by_name

__all__ = ["config", "load", "save", "state"]

PREFIX = "base_model.model."  # what PEFT's two wrappers put in front of every name
# PEFT's name of a method -> the module here that has it; by default its own, in lower case.
HOMES = {"LORA": "lora", "MISS": "bone", "BONE": "bone"}
# What a PEFT configuration says about other things than the function: where it came from, what it was for.
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "per_layer",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
EMPTY: tuple[object, ...] = (None, False, "none", {}, [])  # how a PEFT configuration says that an option is off


def state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names: copies on the CPU. A tensor that layers share is there once."""
    return {key: t.detach().cpu().contiguous().clone() for key, t in _tensors(adapters(model, name)).items()}


def config(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """The adapter's configuration as PEFT writes it; what differs by layer is in ``rank_pattern`` and the like.

    Raises:
        ValueError: no such adapter, or layers that differ in an option that PEFT has for all of them together.
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
    if list(find(model, targets, any_module=True)) != list(found):  # a name that ends another layer's: be exact
        targets = "|".join(map(re.escape, found))
    layers = find(model, targets, any_module=True).values()
    layout: dict[str, Any] = {"fan_in_fan_out": _transposed(layers)} if kind.peft.patterns else {}
    if per_layer:
        layout["per_layer"] = per_layer
    return {"target_modules": targets, "inference_mode": True, **_written(kind, common), **patterns, **layout}


def save(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write one adapter to a folder, which is made if need be. The model may be merged; it does not change.

    Raises:
        ValueError: no such adapter, or as in :func:`config`.
    """
    write_files(path, _tensors(adapters(model, name)), config(model, name))


def load(model: nn.Module, path: str | Path, name: str = "default", *, freeze: bool = True, **extra: Any) -> list[str]:
    """Put a saved adapter, of ours or of PEFT, into the model under a name of your choice; it becomes active.

    Args:
        model: of the architecture that the adapter was made for.
        path: the folder.
        name: any that the model does not have.
        freeze: as in :func:`~peftref.adapters.core.injection.inject`.
        extra: arguments of the method that no file keeps, such as a shared bank.

    Returns:
        The full names of the adapted layers.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: an unknown method, an option of PEFT that is not implemented, tensors that are missing, too many or
            of another shape, or as in :func:`~peftref.adapters.core.injection.inject`.
    """
    folder = Path(path)
    spec = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    kind = _kind(spec.get("peft_type"))
    _check_options(spec, kind)
    options = _read(kind, spec)
    own = spec.get("per_layer") or {}
    targets = spec.get("target_modules")
    exclude = spec.get("exclude_modules") or ()
    layers = find(model, targets, exclude, any_module=kind.any_module, all_names=False)  # its tensors say all
    if spec.get("fan_in_fan_out") and not _transposed(layers.values()):
        raise ValueError("fan_in_fan_out: expected False for a model without Conv1D layers, got True")
    for option, pattern in kind.peft.patterns.items():
        for n, value in by_pattern(pattern, spec.get(pattern) or {}, layers).items():
            own.setdefault(n, {})[option] = value
    new = build(model, kind, "|".join(map(re.escape, layers)), per_layer=own, **options, **extra)
    places = _tensors(new)
    tensors = {_now(key, kind): t for key, t in load_file(folder / "adapter_model.safetensors").items()}
    found = {
        "missing": sorted(places.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - places.keys() - _of_the_base(model, tensors)),
        "shapes": [
            f"{k} {tuple(tensors[k].shape)} for {tuple(t.shape)}"
            for k, t in places.items()
            if k in tensors and tensors[k].shape != t.shape
        ],
    }
    if any(found.values()):
        lists = "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names)
        raise ValueError(f"path: expected the tensors of its configuration on this model; {lists}")
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])
    install(model, new, name, freeze=freeze)
    return list(new)


def write_files(path: str | Path, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
    """Write the two files in PEFT's layout.

    Args:
        path: a folder, which is made if need be.
        tensors: by PEFT's names.
        spec: the configuration.
    """
    folder = Path(path)
    text = json.dumps(spec, indent=2, sort_keys=True)
    kept = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}  # no views, no shared memory
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    with replacing(config) as new_config, replacing(weights) as new_weights:  # both are there before either is replaced
        save_file(kept, new_weights, metadata={"format": "pt"})
        new_config.write_text(text + "\n", encoding="utf-8")


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


def _of_the_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """PEFT may write an adapted head's frozen weight beside its adapter: harmless where it is this model's own."""
    own = {
        f"{PREFIX}{n}.{inside}{key}": p
        for n, module in modules_by_name(model).items()
        for key, p in frozen_module(module).named_parameters(recurse=False)
        for inside in ("", "base_layer.")
    }
    return {key for key, t in tensors.items() if key in own and torch.equal(t, own[key].detach().cpu().to(t.dtype))}


def _kind(peft_type: str | None) -> type[Adapter]:
    """The method of a configuration: a subclass that is there, or the one in the module of that name."""
    slug = HOMES.get(str(peft_type), str(peft_type).lower())
    part = __package__.removesuffix(".core")
    places = (f"{part}.{slug}", f"{part}.baselines.{slug}")
    if slug not in KINDS and slug.isidentifier():
        for name in filter(importlib.util.find_spec, places):
            importlib.import_module(name)
    if slug not in KINDS:
        raise ValueError(f"peft_type: expected a method that is known or imported, {sorted(KINDS)}, got {peft_type!r}")
    return KINDS[slug]


def _check_options(spec: Mapping[str, Any], kind: type[Adapter]) -> None:
    read = {*NEUTRAL, *kind.options, *kind.peft.patterns.values(), *_written(kind, {}), "fan_in_fan_out"}
    for option, value in spec.items():
        allowed = kind.peft.ignored.get(option, EMPTY)
        if option not in read and allowed is not ... and value not in allowed:
            raise ValueError(f"{option}: expected one of {allowed}, the only ones implemented, got {value!r}")


def _written(kind: type[Adapter], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a PEFT configuration names them, with ``peft_type``."""
    if kind.peft.write is not None:
        return kind.peft.write(options)
    return {"peft_type": kind.kind.upper(), **options}


def _read(kind: type[Adapter], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a PEFT configuration holds."""
    if kind.peft.read is not None:
        return kind.peft.read(spec)
    return {name: spec[name] for name in kind.options if name in spec}


def _transposed(layers: Iterable[nn.Module]) -> bool:
    """PEFT wants to be told of ``Conv1D``, which keeps its weight transposed."""
    return any(type(layer).__name__ == "Conv1D" for layer in layers)
