"""Cuts ``fashion8k.npz`` from Fashion-MNIST: ``python -m peftref.data.make_fashion8k``.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv 1708.07747.

600 images per class come from the 60,000 training images and 200 per class from the 10,000 test images, drawn without
replacement by a seeded NumPy generator and stored in random order, so that any run of rows is a class-balanced iid
sample. The source is Debian's package ``dataset-fashion-mnist`` (MIT); a folder with the same four IDX files may be
given instead. The archive carries fixed time stamps: the same images and the same zlib give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._replacing import replace_text, replacing
from .read import read_idx

__all__ = ["balanced_rows", "cut", "to_npz"]

SOURCE = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).with_name("fashion8k.npz")
SEED = 1708_07747  # any fixed number; this one is the arXiv identifier
PER_CLASS = {"train": ("train", 600), "test": ("t10k", 200)}  # split -> (stem of the IDX files, images per class)


def balanced_rows(y: NDArray[np.integer], per_class: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Rows of a random subset with ``per_class`` members of every class, in random order.

    >>> rows = balanced_rows(np.array([0, 1, 0, 1, 0]), 2, np.random.default_rng(0))
    >>> sorted(np.array([0, 1, 0, 1, 0])[rows].tolist())
    [0, 0, 1, 1]
    """
    shuffled = rng.permutation(len(y))
    members = [shuffled[y[shuffled] == k] for k in np.unique(y)]
    if min(map(len, members)) < per_class:
        raise ValueError(f"per_class: expected at most {min(map(len, members))} (the rarest class), got {per_class}")
    return rng.permutation(np.concatenate([rows[:per_class] for rows in members]))


def cut(source: Path = SOURCE) -> dict[str, NDArray[np.uint8]]:
    """The four arrays ``x_train y_train x_test y_test`` of the subset."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, NDArray[np.uint8]] = {}
    for split, (stem, per_class) in PER_CLASS.items():
        x = read_idx(source / f"{stem}-images-idx3-ubyte.gz")
        y = read_idx(source / f"{stem}-labels-idx1-ubyte.gz")
        rows = balanced_rows(y, per_class, rng)
        arrays |= {f"x_{split}": x[rows], f"y_{split}": y[rows]}
    return arrays


def to_npz(arrays: dict[str, NDArray[np.uint8]]) -> bytes:
    """``arrays`` as the bytes of a compressed ``.npz``; unlike ``np.savez_compressed``, without the time of the day."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # else the byte differs between Windows and Unix
            stored = io.BytesIO()
            np.save(stored, array, allow_pickle=False)
            archive.writestr(entry, stored.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


if __name__ == "__main__":
    body = to_npz(cut(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE))
    with replacing(TARGET) as part:
        part.write_bytes(body)
    replace_text(TARGET.with_suffix(".sha256"), f"{hashlib.sha256(body).hexdigest()}  {TARGET.name}\n")
    print(f"{TARGET}: {len(body):,} bytes")
