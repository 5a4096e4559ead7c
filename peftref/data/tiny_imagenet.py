"""Tiny-ImageNet as published: 200 classes of ImageNet, 64 x 64 JPEG photographs, in folders.

====================================  =========================================================================
``wnids.txt``                         WordNet name of each class (``n01443537``), one a line, in no order
``words.txt``                         WordNet name and its words, for far more names than the 200
``train/<wnid>/images/*.JPEG``        500 training images of each class
``val/images/*.JPEG``                 50 validation images of each class, all in one folder
``val/val_annotations.txt``           file name and WordNet name of each of them (then a box, not read)
====================================  =========================================================================

The published test images have no labels and are not read. Classes are numbered in the order of their WordNet names, as
ImageNet's are, so :func:`peftref.models.imagenet_classes` finds the outputs of an ImageNet classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .._checks import integer, one_of

__all__ = ["TinyImageNet", "read_tiny_imagenet"]

FOLDER = "tiny-imagenet-200"
SIDE = 64


class TinyImageNet(NamedTuple):
    """One part of Tiny-ImageNet.

    Attributes:
        x: uint8 ``(N, 3, 64, 64)``; ``x.float() / 255`` lies in [0, 1].
        y: int64 ``(N,)``, index into ``wnids``.
        wnids: WordNet name of each class, sorted.
        words: its first word: ``"goldfish"``.
    """

    x: Tensor
    y: Tensor
    wnids: tuple[str, ...]
    words: tuple[str, ...]


def read_tiny_imagenet(root: str | Path, part: str = "val", per_class: int | None = None) -> TinyImageNet:
    """Images of ``root``, or of ``root/tiny-imagenet-200``, in 8 bits: 123 MB for all 10,000 validation images.

    Args:
        root: where ``wnids.txt`` lies, or its parent.
        part: ``"train"`` (class after class) or ``"val"`` (in the published order, which mixes the classes).
        per_class: only the first images of each class, this many or as many as there are; default: all.

    Raises:
        FileNotFoundError: no such folder, a class without images, or an image that the annotations name is missing.
        ValueError: an unknown part; a label, a size, or a file that is not as published.
    """
    one_of("part", part, ("train", "val"))
    if per_class is not None:
        integer("per_class", per_class, 1)
    folder = tiny_imagenet_folder(Path(root))
    if folder is None:
        raise FileNotFoundError(f"root: expected wnids.txt in {root} or in {Path(root) / FOLDER}, found in neither")
    wnids = tuple(sorted((folder / "wnids.txt").read_text().split()))
    number = {wnid: k for k, wnid in enumerate(wnids)}
    listed = _train_files(folder, wnids) if part == "train" else _val_files(folder, number)
    kept: list[tuple[Path, int]] = []
    count = dict.fromkeys(wnids, 0)
    for path, wnid in listed:
        if per_class is None or count[wnid] < per_class:
            count[wnid] += 1
            kept.append((path, number[wnid]))
    x = np.empty((len(kept), 3, SIDE, SIDE), np.uint8)
    for i, (path, _) in enumerate(kept):
        x[i] = _decoded(path)
    return TinyImageNet(torch.from_numpy(x), torch.tensor([k for _, k in kept]), wnids, _words(folder, wnids))


def tiny_imagenet_folder(root: Path) -> Path | None:
    """The folder that holds the set, if it is there."""
    return next((folder for folder in (root / FOLDER, root) if (folder / "wnids.txt").is_file()), None)


def _train_files(folder: Path, wnids: Sequence[str]) -> list[tuple[Path, str]]:
    found = []
    for wnid in wnids:
        images = folder / "train" / wnid / "images"
        paths = sorted(images.glob("*.JPEG"), key=lambda path: (len(path.name), path.name))  # _2 before _10
        if not paths:
            raise FileNotFoundError(f"{images}: expected JPEG files, found none")
        found += [(path, wnid) for path in paths]
    return found


def _val_files(folder: Path, number: dict[str, int]) -> list[tuple[Path, str]]:
    annotations = folder / "val" / "val_annotations.txt"
    found = []
    for line in annotations.read_text().splitlines():
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise ValueError(f"{annotations}: expected file name and WordNet name of wnids.txt a line, got {line!r}")
        found.append((folder / "val" / "images" / fields[0], fields[1]))
    if not found:
        raise ValueError(f"{annotations}: expected a line for each image, got an empty file")
    return found


def _words(folder: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    lines = (folder / "words.txt").read_text(encoding="utf-8").splitlines()
    words = {wnid: text.split(",")[0] for wnid, _, text in (line.partition("\t") for line in lines)}
    return tuple(words.get(wnid) or wnid for wnid in wnids)


def _decoded(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))  # some photographs are grey
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected a JPEG photograph, found no file; fetch the set again") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a whole JPEG photograph, could not read it: {error}") from error
    if pixels.shape != (SIDE, SIDE, 3):
        height, width = pixels.shape[:2]
        raise ValueError(f"{path}: expected {SIDE} x {SIDE} pixels, got {height} x {width}")
    return pixels.transpose(2, 0, 1)
