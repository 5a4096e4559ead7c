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

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..._replacing import new_folder
from .headers import DTYPES, INDEX, SINGLE, Header, identity, read_header, shards_of
from .loop import Rule, fill

__all__ = ["Checkpoint", "merge_checkpoints"]

# A file is read through the page cache, and its pages count as ours for as long as it is open. Opening it anew after so
# many bytes bounds what we hold; the header is read again each time, which costs nothing beside them.
WINDOW = 1 << 26


class Checkpoint(Mapping[str, Tensor]):
    """A state dict whose tensors are read from safetensors when asked for, on the CPU.

    Args:
        path: a ``.safetensors`` file, or a folder with one, or with shards and their index.

    Attributes:
        files: shard -> names of its tensors, in the order in which they are stored.
        layout: name -> a tensor on the meta device with its shape and type.
        headers: shard -> what stands before its data.
        index: what stands in the index; None without one.

    Raises:
        FileNotFoundError: no checkpoint there, a shard of its index is missing, or the index points outside its folder.
        ValueError: a file that is not safetensors, that lacks a tensor of the index, or that is replaced or changed
            while tensors are still read from it; a folder with both a single file and an index of others.
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path: expected the path of a checkpoint, got {type(path).__name__}")
        self.path = Path(path)
        self.files: dict[Path, list[str]] = {}
        self.layout: dict[str, Tensor] = {}
        self.headers: dict[Path, Header] = {}
        self._home: dict[str, Path] = {}
        self._open: tuple[Path, safe_open] | None = None
        self._read = 0
        shards, self.index = shards_of(self.path)
        self._seen = {file: identity(file) for file in shards}
        for file, wanted in shards.items():
            self.headers[file] = read_header(file)
            entries = self.headers[file].entries
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
        self.check_unchanged(file)  # a shorter file would end the process, not raise
        if self._open is None or self._open[0] != file or self._read + size > WINDOW:
            self._open = (file, safe_open(file, framework="pt"))
            self._read = 0
        self._read += size
        tensor: Tensor = self._open[1].get_tensor(name)
        aligned = tensor.data_ptr() % tensor.element_size() == 0  # a header may have any length
        return tensor if aligned else tensor.clone()

    def check_unchanged(self, *files: Path) -> None:
        """Whether files, or all of them, are still those whose headers were read.

        Raises:
            ValueError: another file has taken the place of one, or it has been written to.
        """
        for file in files or self.files:
            if not file.is_file() or identity(file) != self._seen[file]:
                raise ValueError(f"path: expected {file} as it was when it was opened, got another or changed file")

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

    The folder appears complete or not at all: it is written under another name, brought to the disk and renamed at the
    end. What a killed merge into the same folder left is removed; a checkpoint that changes meanwhile is refused.

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
        FileNotFoundError, TypeError, ValueError: see :class:`Checkpoint` and :func:`~peftref.merging.core.loop.merge`.
    """
    if isinstance(models, str | os.PathLike) or not isinstance(models, Sequence):
        raise TypeError(f"models: expected a sequence of paths, got the path {str(models)!r}")
    out = Path(out)
    if os.path.lexists(out):
        raise FileExistsError(f"out: expected a folder that does not exist yet, got {out}")
    host = Checkpoint(base)
    parts = [Checkpoint(m) for m in models]
    with new_folder(out) as folder:
        draft = _Draft(host, folder)
        fill(host, parts, rule, draft.place, skip=skip, device=device, rehearse=False)
        draft.finish()
        for checkpoint in (host, *parts):
            checkpoint.check_unchanged()
    return out


class _Draft:
    """Files with the layout of a checkpoint: each header copied as it is, the rest reserved, to be filled in place."""

    def __init__(self, like: Checkpoint, folder: Path) -> None:
        self._place: dict[str, tuple[Path, int]] = {}
        self._apart: tuple[str, Tensor] | None = None
        for source, (header, start, entries) in like.headers.items():
            size = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            file = folder / (SINGLE if like.index is None else source.name)
            with file.open("wb") as f:
                f.write(header)
                f.flush()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, size)  # a full disk is noticed here
                f.truncate(size)
            self._place |= {t: (file, start + entry["data_offsets"][0]) for t, entry in entries.items()}
        if like.index is not None:
            with (folder / INDEX).open("wb") as f:
                f.write(like.index)

    def place(self, name: str, like: Tensor) -> Tensor:
        """The bytes of a tensor in its file, as a tensor; they are ours only as long as somebody holds it.

        Where they begin at an address that is no multiple of the type's size, memory apart, written when it is full.
        """
        self.finish()
        file, start = self._place[name]
        if start % like.element_size() or not like.numel():
            self._apart = (name, torch.empty_like(like, memory_format=torch.contiguous_format))
            return self._apart[1]
        mapped = torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8)
        return mapped[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def finish(self) -> None:
        """Write what was filled apart."""
        if self._apart is not None:
            (name, tensor) = self._apart
            file, start = self._place[name]
            with file.open("r+b") as f:
                f.seek(start)
                f.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            self._apart = None
