"""Parsers of the published image-file formats: bytes in, NumPy arrays out, nothing downloaded and nothing executed.

================================  ==========================================================  =====================
function                          format                                                      specified by
================================  ==========================================================  =====================
:func:`read_idx`                  IDX (MNIST, Fashion-MNIST), plain or gzip                   LeCun, Cortes, Burges
:func:`read_cifar_binary`         CIFAR-10/100 "binary version", one record per image         Krizhevsky (2009)
:func:`read_cifar_python`         CIFAR-10/100 "python version", a pickled dictionary         Krizhevsky (2009)
:func:`read_cifar_c`              CIFAR-10/100-C, one ``.npy`` per corruption                 Hendrycks, Dietterich
================================  ==========================================================  =====================

Every parser checks the magic number and every size before it believes a file, and its error names the file. A pickle
can run any code when loaded, so the python version goes through an unpickler that knows NumPy arrays and plain
containers only.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_cifar_binary", "read_cifar_c", "read_cifar_names", "read_cifar_python", "read_idx"]

Images = NDArray[np.uint8]
Labels = NDArray[np.uint8]

# Third byte of an IDX magic number. All but the first are big-endian, as the format prescribes.
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CIFAR_PIXELS = 3 * 32 * 32


def read_idx(path: str | Path) -> NDArray[Any]:
    """Array stored in an IDX file, plain or gzip (told by its first two bytes, not by its name).

    Args:
        path: for example ``train-images-idx3-ubyte.gz``.

    Returns:
        The array in native byte order; images come as ``(N, 28, 28)`` uint8, labels as ``(N,)`` uint8.

    Raises:
        ValueError: not IDX, or fewer or more data bytes than the header announces.
    """
    path = Path(path)
    body = path.read_bytes()
    if body[:2] == b"\x1f\x8b":
        try:
            body = gzip.decompress(body)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, got a damaged one ({error})") from error
    # Magic: two zero bytes, the element type, the number of dimensions; then one big-endian uint32 per dimension.
    if len(body) < 4 or body[:2] != b"\0\0" or body[2] not in _IDX_TYPES or body[3] == 0:
        raise ValueError(
            f"{path}: expected the magic number of an IDX file (00 00 type dimensions), got {body[:4].hex(' ')!r}"
        )
    start = 4 + 4 * body[3]
    if len(body) < start:
        raise ValueError(f"{path}: expected an IDX header of {start} bytes, got a file of {len(body)}")
    shape = struct.unpack(f">{body[3]}I", body[4:start])
    dtype = np.dtype(_IDX_TYPES[body[2]])
    expected = math.prod(shape) * dtype.itemsize
    if len(body) - start != expected:
        raise ValueError(f"{path}: expected {expected} data bytes for shape {shape}, got {len(body) - start}")
    return np.frombuffer(body, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read_cifar_binary(path: str | Path, classes: int = 10) -> tuple[Images, Labels]:
    """Images and labels of one ``.bin`` file: records of label byte(s) followed by 3,072 bytes, red plane first.

    Args:
        path: for example ``cifar-10-batches-bin/test_batch.bin``.
        classes: 10, or 100 (two label bytes, coarse then fine; the fine one is returned).

    Returns:
        Images ``(N, 3, 32, 32)`` and labels ``(N,)``, both uint8.

    Raises:
        ValueError: the file is empty or no whole number of records, or a label is out of range.
    """
    path = Path(path)
    head = _label_bytes(classes)
    body = np.fromfile(path, np.uint8)
    record = head + _CIFAR_PIXELS
    if len(body) == 0 or len(body) % record:
        raise ValueError(f"{path}: expected whole CIFAR-{classes} records of {record} bytes, got {len(body)} bytes")
    body = body.reshape(-1, record)
    return _checked(path, body[:, head:].reshape(-1, 3, 32, 32), body[:, head - 1], classes)


def read_cifar_python(path: str | Path, classes: int = 10) -> tuple[Images, Labels]:
    """Images and labels of one pickled batch, the layout torchvision keeps; same result as :func:`read_cifar_binary`.

    Args:
        path: for example ``cifar-10-batches-py/test_batch``.
        classes: 10 (key ``labels``) or 100 (key ``fine_labels``).

    Raises:
        ValueError: not such a pickle, a pickle naming anything but NumPy arrays, or sizes that disagree.
    """
    path = Path(path)
    key = "labels" if _label_bytes(classes) == 1 else "fine_labels"
    batch = _unpickle(path)
    if not (isinstance(batch, dict) and {"data", key} <= batch.keys()):
        raise ValueError(f"{path}: expected a pickled dictionary with keys 'data' and {key!r}, got {_summary(batch)}")
    x = np.asarray(batch["data"])
    y = np.asarray(batch[key])
    if x.dtype != np.uint8 or x.shape != (len(y), _CIFAR_PIXELS) or y.ndim != 1 or y.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: expected uint8 data of shape (N, {_CIFAR_PIXELS}) and N integer labels, "
            f"got {x.dtype} {x.shape} and {y.dtype} {y.shape}"
        )
    return _checked(path, x.reshape(-1, 3, 32, 32), y, classes)


def read_cifar_names(path: str | Path) -> tuple[str, ...]:
    """Class names: from ``batches.meta`` / ``meta`` (pickles) or ``batches.meta.txt`` / ``fine_label_names.txt``."""
    path = Path(path)
    if path.suffix == ".txt":
        return tuple(path.read_text().split())
    meta = _unpickle(path)
    for key in ("label_names", "fine_label_names"):
        if isinstance(meta, dict) and key in meta:
            return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in meta[key])
    raise ValueError(
        f"{path}: expected a pickled dictionary with 'label_names' or 'fine_label_names', got {_summary(meta)}"
    )


def read_cifar_c(root: str | Path, name: str, severity: int) -> tuple[Images, Labels]:
    """One corruption at one severity of CIFAR-10-C or CIFAR-100-C, in the order of the clean test set.

    ``<name>.npy`` stacks the five severities; rows :math:`(s-1)n` to :math:`sn-1` hold severity :math:`s`
    (:math:`n` = 10,000).

    Args:
        root: folder with ``<name>.npy`` and ``labels.npy``.
        name: for example ``"gaussian_noise"``.
        severity: 1 to 5.

    Returns:
        Images ``(n, 3, 32, 32)`` and labels ``(n,)``, both uint8.

    Raises:
        ValueError: severity out of range, or arrays of another type or size.
    """
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity: expected an integer from 1 to 5, got {severity!r}")
    root = Path(root)
    x, y = (np.load(root / f"{stem}.npy", mmap_mode="r", allow_pickle=False) for stem in (name, "labels"))
    if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or len(x) == 0 or len(x) % 5 or y.shape != (len(x),):
        raise ValueError(
            f"{root / name}.npy: expected uint8 (5n, 32, 32, 3) with labels (5n,), "
            f"got {x.dtype} {x.shape} with {y.shape}"
        )
    n = len(x) // 5
    rows = slice((severity - 1) * n, severity * n)  # a memory map: only these rows are read
    return np.ascontiguousarray(x[rows].transpose(0, 3, 1, 2)), np.asarray(y[rows]).astype(np.uint8)


def _label_bytes(classes: int) -> int:
    if classes not in (10, 100):
        raise ValueError(f"classes: expected 10 or 100, got {classes!r}")
    return 1 if classes == 10 else 2


def _checked(path: Path, x: NDArray[Any], y: NDArray[Any], classes: int) -> tuple[Images, Labels]:
    if len(y) and not (y.min() >= 0 and y.max() < classes):
        raise ValueError(f"{path}: expected labels from 0 to {classes - 1}, got {y.min()} to {y.max()}")
    return np.ascontiguousarray(x), y.astype(np.uint8)


class _ArraysOnly(pickle.Unpickler):
    """Resolves the few names a pickled NumPy array needs; any other name, hence any code, is refused."""

    # NumPy 2 renamed ``numpy.core``; the official files say ``numpy.core``, files written today ``numpy._core``.
    allowed = {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
    } | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR batch needs")
        if module.startswith("numpy."):
            core = "_core" if hasattr(np, "_core") else "core"
            module = f"numpy.{core}.{module.rsplit('.', 1)[1]}"
        return super().find_class(module, name)


def _unpickle(path: Path) -> Any:
    try:
        value = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise ValueError(f"{path}: expected a pickled CIFAR batch, could not read it: {error}") from error
    if not isinstance(value, dict):
        return value
    return {k.decode() if isinstance(k, bytes) else k: v for k, v in value.items()}  # Python 2 wrote byte strings


def _summary(value: object) -> str:
    return f"keys {sorted(map(str, value))}" if isinstance(value, dict) else type(value).__name__
