"""Checkpoints larger than memory: safetensors read and written one tensor at a time.

A checkpoint is one ``.safetensors`` file, or a folder with ``model.safetensors`` or with shards and their
``model.safetensors.index.json`` (the layout of the Hugging Face hub). :class:`Checkpoint` opens it as a mapping that
reads a tensor when it is asked for; :func:`merge_checkpoints` merges such mappings into a new checkpoint with the
layout of the base: the same shards, names, types and metadata. Nothing but safetensors is opened, so no checkpoint can
run code.

>>> import tempfile, torch
>>> from pathlib import Path
>>> from safetensors.torch import load_file, save_file
>>> from peftref.merging.baselines.arithmetic import wise_ft
>>> folder = Path(tempfile.mkdtemp())
>>> save_file({"w": torch.tensor([0.0, 4.0])}, folder / "base.safetensors")
>>> save_file({"w": torch.tensor([2.0, 0.0])}, folder / "tuned.safetensors")
>>> out = merge_checkpoints(folder / "base.safetensors", [folder / "tuned.safetensors"], wise_ft(0.5), folder / "out")
>>> load_file(out / "model.safetensors")
{'w': tensor([1., 2.])}
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .loop import Rule, fill

__all__ = ["Checkpoint", "merge_checkpoints"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A file is read through the page cache, and its pages count as ours for as long as it is open. Opening it anew after so
# many bytes bounds what we hold; the header is read again each time, which costs nothing beside them.
WINDOW = 1 << 26
DTYPES = {
    **{f"F{b}": getattr(torch, f"float{b}") for b in (16, 32, 64)},
    **{f"I{b}": getattr(torch, f"int{b}") for b in (8, 16, 32, 64)},
    **{"BF16": torch.bfloat16, "BOOL": torch.bool, "U8": torch.uint8, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


class Checkpoint(Mapping[str, Tensor]):
    """A state dict whose tensors are read from safetensors when asked for, on the CPU.

    Args:
        path: a ``.safetensors`` file, or a folder with one, or with shards and their index.

    Attributes:
        files: shard -> names of its tensors, in the order in which they are stored.
        layout: name -> a tensor on the meta device with its shape and type.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard of its index is missing.
        ValueError: a file that is not safetensors, or that lacks a tensor of the index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: dict[Path, list[str]] = {}
        self.layout: dict[str, Tensor] = {}
        self._home: dict[str, Path] = {}
        self._open: tuple[Path, safe_open] | None = None
        self._read = 0
        for file, wanted in _shards(self.path).items():
            _, _, entries = _header(file)
            if wanted is not None and wanted != set(entries):
                raise ValueError(f"path: {file.name} and its index differ in {sorted(wanted ^ set(entries))}")
            self.files[file] = sorted(entries, key=lambda name: entries[name]["data_offsets"])
            for name in self.files[file]:
                dtype = DTYPES[entries[name]["dtype"]]
                shape = entries[name]["shape"]
                self.layout[name] = torch.empty(shape, dtype=dtype, device="meta")
                self._home[name] = file

    def __getitem__(self, name: str) -> Tensor:
        file = self._home[name]
        size = self.layout[name].nbytes
        if self._open is None or self._open[0] != file or self._read + size > WINDOW:
            self._open = (file, safe_open(file, framework="pt"))
            self._read = 0
        self._read += size
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def merge_checkpoints(
    base: str | Path,
    models: Sequence[str | Path],
    rule: Rule,
    out: str | Path,
    *,
    skip: Collection[str] = (),
    device: torch.device | str | None = None,
) -> Path:
    """Merge checkpoints on disk into the new folder ``out``, in the memory of a few tensors.

    The folder appears complete or not at all: it is written under another name and renamed at the end.

    Args:
        base: a path as :class:`Checkpoint` takes it.
        models: paths of the N models.
        rule: as of :func:`peftref.merging.core.loop.merge`.
        out: a folder that does not exist yet.
        skip: names to copy from the base.
        device: where to compute.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError, ValueError: see :class:`Checkpoint` and :func:`~peftref.merging.core.loop.merge`.
    """
    if isinstance(models, (str, Path)):
        raise TypeError(f"models: expected a sequence of paths, got the path {str(models)!r}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out: expected a folder that does not exist yet, got {out}")
    host = Checkpoint(base)
    parts = [Checkpoint(m) for m in models]
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        fill(host, parts, rule, _Draft(host, draft).place, skip=skip, device=device)
        if len(host.files) > 1:
            shutil.copy(host.path / INDEX, draft / INDEX)
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return out


class _Draft:
    """Files with the layout of a checkpoint: each header copied as it is, the rest reserved, to be filled in place."""

    def __init__(self, like: Checkpoint, folder: Path) -> None:
        self._place: dict[str, tuple[Path, int]] = {}
        for source in like.files:
            header, start, entries = _header(source)
            file = folder / (source.name if len(like.files) > 1 else SINGLE)
            with file.open("wb") as f:
                f.write(header)
                f.flush()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, source.stat().st_size)  # a full disk is noticed here
                f.truncate(source.stat().st_size)
            self._place |= {t: (file, start + entry["data_offsets"][0]) for t, entry in entries.items()}

    def place(self, name: str, like: Tensor) -> Tensor:
        """The bytes of a tensor in its file, as a tensor; they are ours only as long as somebody holds it."""
        file, start = self._place[name]
        mapped = torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8)
        return mapped[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """Each file of a checkpoint, with the names that its index expects in it (None: no index)."""
    if path.is_dir() and not (path / SINGLE).is_file() and (path / INDEX).is_file():
        named: dict[Path, set[str]] = {}
        for name, file in json.loads((path / INDEX).read_text())["weight_map"].items():
            named.setdefault(path / Path(file).name, set()).add(name)
        shards: dict[Path, set[str] | None] = {**named}
    else:
        shards = {path / SINGLE if path.is_dir() else path: None}
    missing = [str(file) for file in shards if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"path: expected safetensors, found no {', '.join(missing)}")
    return shards


def _header(file: Path) -> tuple[bytes, int, dict[str, dict[str, Any]]]:
    """The bytes before the data, their number, and what they say of each tensor: dtype, shape, data_offsets."""
    with open(file, "rb") as f:
        size = f.read(8)
        text = (
            f.read(int.from_bytes(size, "little")) if file.stat().st_size > 8 + int.from_bytes(size, "little") else b""
        )
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        unknown = {entry["dtype"] for entry in entries.values()} - set(DTYPES)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"path: expected a safetensors file, got {file}") from error
    end = 8 + len(text) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != file.stat().st_size:
        raise ValueError(f"path: expected {end} bytes, got {file.stat().st_size} in {file}; the file is incomplete")
    if unknown:
        raise ValueError(f"path: expected types among {', '.join(DTYPES)}, got {', '.join(sorted(unknown))} in {file}")
    return size + text, 8 + len(text), entries
