"""Files of safetensors: which belong to a checkpoint, and what stands in their headers.

Everything that can be wrong with a file is found here, before a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    **{f"F{b}": getattr(torch, f"float{b}") for b in (16, 32, 64)},
    **{f"I{b}": getattr(torch, f"int{b}") for b in (8, 16, 32, 64)},
    **{f"U{b}": getattr(torch, f"uint{b}") for b in (8, 16, 32, 64)},
    **{"BF16": torch.bfloat16, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


class Header(NamedTuple):
    """What stands before the data, how many bytes that is, and of each tensor its dtype, shape and data_offsets."""

    raw: bytes
    start: int
    entries: dict[str, dict[str, Any]]


def shards_of(path: Path) -> tuple[dict[Path, set[str] | None], bytes | None]:
    """Each file of a checkpoint, with the names that its index expects in it (None: no index); and the index as it is.

    Raises:
        FileNotFoundError: a file is missing, or the index points outside its folder.
        ValueError: a folder with a single file beside an index of others, or an index that is none.
    """
    shards: dict[Path, set[str] | None] = {path / SINGLE if path.is_dir() else path: None}
    text = None
    if path.is_dir() and (path / INDEX).is_file():
        text = (path / INDEX).read_bytes()
        named = _named(path, text)
        if (path / SINGLE).is_file() and set(named) != {SINGLE}:
            raise ValueError(f"path: expected {SINGLE} or an index of shards, got both in {path}; which one is meant?")
        shards = {path / file: names for file, names in named.items()}
    missing = [str(file) for file in shards if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"path: expected safetensors, found no {', '.join(missing)}")
    return shards, text


def read_header(file: Path) -> Header:
    """The header of one file.

    Raises:
        ValueError: no safetensors, an incomplete file, tensors that overlap or leave gaps, or a type that torch lacks.
    """
    with open(file, "rb") as f:
        length = f.read(8)
        size = int.from_bytes(length, "little")
        text = f.read(size) if file.stat().st_size >= 8 + size else b""
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        unknown = {entry["dtype"] for entry in entries.values()} - set(DTYPES)
        spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        counts = {name: math.prod(entry["shape"]) for name, entry in entries.items()}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"path: expected a safetensors file, got {file}") from error
    end = 8 + len(text) + max((stop for _, stop in spans.values()), default=0)
    if end != file.stat().st_size:
        raise ValueError(f"path: expected {end} bytes, got {file.stat().st_size} in {file}; the file is incomplete")
    if unknown:
        raise ValueError(f"path: expected types among {', '.join(DTYPES)}, got {', '.join(sorted(unknown))} in {file}")
    reached = 0
    for name in sorted(entries, key=spans.__getitem__):
        if spans[name] != (reached, reached + counts[name] * DTYPES[entries[name]["dtype"]].itemsize):
            raise ValueError(f"path: expected tensors one after the other, got {name} at {spans[name]} in {file}")
        reached = spans[name][1]
    return Header(length + text, 8 + len(text), entries)


def identity(file: Path) -> tuple[int, ...]:
    """What tells a file from another one under its name, or from itself after a change."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _named(folder: Path, text: bytes) -> dict[str, set[str]]:
    """File -> names of tensors, as an index has them."""
    try:
        pairs = [(str(name), Path(file)) for name, file in json.loads(text)["weight_map"].items()]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"path: expected an index with a weight_map of files, got {folder / INDEX}") from error
    outside = sorted({str(file) for _, file in pairs if file.name != str(file)})
    if outside or not pairs:
        raise FileNotFoundError(f"path: expected an index of files beside it in {folder}, got {outside or 'no file'}")
    named: dict[str, set[str]] = {}
    for name, file in pairs:
        named.setdefault(file.name, set()).add(name)
    return named
