"""The two files of an adapter as they come: what they must be before anyone believes them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
from collections.abc import Collection, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .adapter import KINDS, Adapter
from .targets import by_pattern

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
# PEFT's name of a method -> the module here that has it; by default its own, in lower case.
HOMES = {"LORA": "lora", "MISS": "bone", "BONE": "bone"}
# What a PEFT configuration says about other things than the function: where it came from, what it was for.
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "per_layer",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
EMPTY: tuple[object, ...] = (None, False, "none", {}, [])  # how a PEFT configuration says that an option is off


def read_files(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: one of them is not what its name says.
    """
    folder = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            pickled = file == WEIGHTS and (folder / PICKLED).is_file()
            got = f"{PICKLED}, a pickle, which may run any code; save it as safetensors" if pickled else "no such file"
            raise FileNotFoundError(f"path: expected {file} in {folder}, got {got}")
    try:
        spec = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: expected JSON in {CONFIG}, got what cannot be read ({error})") from None
    if not isinstance(spec, dict):
        raise ValueError(f"path: expected an object {{...}} in {CONFIG}, got a {type(spec).__name__}")
    try:
        return spec, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"path: expected tensors in {WEIGHTS}, got what cannot be read ({error})") from None


def method(spec: Mapping[str, Any]) -> type[Adapter]:
    """The method of a configuration: a subclass that is there, or the one in the module of that name.

    Raises:
        TypeError: targets that are no names.
        ValueError: an unknown one, or an option of PEFT that is not implemented or of another type.
    """
    peft_type = spec.get("peft_type")
    slug = HOMES.get(str(peft_type), str(peft_type).lower())
    part = __package__.removesuffix(".core")
    places = (f"{part}.{slug}", f"{part}.baselines.{slug}")
    if slug not in KINDS and slug.isidentifier():
        for name in filter(importlib.util.find_spec, places):
            importlib.import_module(name)
    if slug not in KINDS:
        raise ValueError(f"peft_type: expected a method that is known or imported, {sorted(KINDS)}, got {peft_type!r}")
    kind = KINDS[slug]
    read = {*NEUTRAL, *kind.options, *kind.peft.patterns.values(), *written(kind, {}), "fan_in_fan_out"}
    for option, value in spec.items():
        allowed = kind.peft.ignored.get(option, EMPTY)
        if option not in read and allowed is not ... and value not in allowed:
            raise ValueError(f"{option}: expected one of {allowed}, the only ones implemented, got {value!r}")
    for option in ("target_modules", "exclude_modules"):
        if not isinstance(spec.get(option), str | list | None):
            raise TypeError(f"{option}: expected names of layers or one regular expression, got {spec[option]!r}")
    for option, of in {"fan_in_fan_out": bool, "modules_to_save": list}.items():
        if not isinstance(spec.get(option), of | None):
            raise ValueError(f"{option}: expected a {of.__name__}, got {spec[option]!r}")
    if not all(isinstance(end, str) and end for end in spec.get("modules_to_save") or ()):
        raise ValueError(f"modules_to_save: expected names of modules, got {spec['modules_to_save']!r}")
    return kind


def written(kind: type[Adapter], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a PEFT configuration names them, with ``peft_type``."""
    if kind.peft.write is not None:
        return kind.peft.write(options)
    return {"peft_type": kind.kind.upper(), **options}


def options_of(kind: type[Adapter], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a PEFT configuration holds.

    Raises:
        ValueError: a value of another type than the option's default.
    """
    if kind.peft.read is not None:
        return _typed(kind, kind.peft.read(spec))
    return _typed(kind, {name: spec[name] for name in kind.options if name in spec})


def by_layer(kind: type[Adapter], spec: Mapping[str, Any], layers: Collection[str]) -> dict[str, dict[str, Any]]:
    """The options of single layers, by plain name.

    Raises:
        TypeError: patterns that are no dictionary.
        ValueError: values of another type, a pattern that is no regular expression or that no layer matches.
    """
    own = spec.get("per_layer") or {}
    if not isinstance(own, dict) or not all(isinstance(options, dict) for options in own.values()):
        raise ValueError(f"per_layer: expected the options of single layers, by name, got {own!r}")
    found = {n: _typed(kind, options) for n, options in own.items()}
    for option, pattern in kind.peft.patterns.items():
        for n, value in by_pattern(pattern, spec.get(pattern) or {}, layers).items():
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{pattern}: expected finite numbers, got {value!r} for {n}")
            found.setdefault(n, {})[option] = value
    return found


def misfits(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Tensors of a file that cannot be what is wanted in their place: by shape, by type, or by their values."""
    pairs = [(key, place, tensors[key]) for key, place in places.items() if key in tensors]
    same = [(key, place, t) for key, place, t in pairs if place.shape == t.shape]
    alike = [(key, place, t) for key, place, t in same if _alike(place, t)]
    values = [(key, t.to(place.dtype)) for key, place, t in alike if isinstance(place, nn.Parameter)]
    return {
        "shapes": [f"{k} {tuple(t.shape)} for {tuple(p.shape)}" for k, p, t in pairs if p.shape != t.shape],
        "types": [f"{key} {t.dtype} for {place.dtype}" for key, place, t in same if not _alike(place, t)],
        "not finite": [key for key, t in values if t.is_floating_point() and not t.isfinite().all()],
    }


def _alike(place: Tensor, t: Tensor) -> bool:
    return t.dtype == place.dtype or (place.is_floating_point() and t.is_floating_point())


def _typed(kind: type[Adapter], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, where none is of another type than its default: a word for a truth, a truth for a number."""
    arguments = inspect.signature(kind.__init__).parameters
    for name, value in options.items():
        default = arguments[name].default if name in arguments else None
        other: tuple[type, ...] = ()  # types that an option with this default never has
        if isinstance(default, bool):
            other = (str, int, float, list, dict, type(None))
        elif isinstance(default, Real):
            other = (str,)
        elif isinstance(default, str):
            other = (int, float)
        mistaken = isinstance(value, bool) and not isinstance(default, bool) and default is not None
        if mistaken or (isinstance(value, other) and type(value) is not type(default)):
            raise ValueError(f"{name}: expected a {type(default).__name__}, got {value!r}")
    return dict(options)
