"""CIFAR-10's own files, shortened, for tests of what reads them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np


def lay_cifar10(root: Path, each: int) -> Path:
    """``each`` images of every class in each of the six files, under ``root``; the level of an image says its class."""
    rng, folder = np.random.default_rng(0), root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        y = np.tile(np.arange(10), each)
        x = rng.integers(0, 50, (len(y), 3072)) + 20 * y[:, None]
        (folder / name).write_bytes(pickle.dumps({b"data": x.astype(np.uint8), b"labels": y.tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [f"class {k}".encode() for k in range(10)]}))
    return root
