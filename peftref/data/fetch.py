"""Downloads: one file with its checksum, and the four public image sets that do not fit in the package.

A file appears under its final name only when it is whole and its checksum agrees; a failure leaves nothing behind.
Fashion-MNIST and CIFAR are laid out exactly as torchvision lays them out, with the addresses and checksums of
``torchvision.datasets`` (a test compares them), so ``torchvision.datasets.CIFAR10(root)`` reads what is fetched here
and :func:`peftref.data.load` reads what torchvision fetched. Its own ``download=True`` is not used because it writes
under the final name from the first byte on: an interrupted download would be taken for the file.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

from .._replacing import replacing

__all__ = [
    "DEFAULT_ROOT",
    "download",
    "fetch_cifar10",
    "fetch_cifar100",
    "fetch_fashion_mnist",
    "fetch_tiny_imagenet",
]

#: Where ``fetch_*`` puts files and :func:`peftref.data.load` looks for them when no ``root`` is given.
DEFAULT_ROOT = Path.home() / ".cache" / "peftref"

# Addresses and MD5 sums as in torchvision.datasets (0.21 to 0.29).
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"  # of 248,100,043 bytes

_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class Archive(NamedTuple):
    """A published archive: file name, MD5 sum, the folder in it, and the files of that folder a reader needs."""

    name: str
    md5: str
    folder: str
    files: tuple[str, ...]


CIFAR10 = Archive(
    "cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py",
    (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
)
CIFAR100 = Archive(
    "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python", ("train", "test", "meta")
)


def download(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    timeout: float = 30.0,
) -> Path:
    """Download ``url`` to ``path``, whole and checked, or not at all.

    A file already at ``path`` with the right checksum is kept and the network left alone. The bytes go to a temporary
    file beside ``path`` and are renamed at the end, so no reader ever sees half a file, not even when two processes
    fetch at once.

    Args:
        url: ``http``, ``https`` or ``file`` address.
        path: final name; missing folders are made.
        sha256: expected checksum in hexadecimal; exactly one of ``sha256`` and ``md5`` is needed.
        md5: the same for publishers that give no other.
        size: expected number of bytes, where known.
        timeout: seconds without any answer before giving up.

    Returns:
        ``path``.

    Raises:
        ConnectionError: no network, no such server or page, or the connection broke; says what to do by hand.
        ValueError: the file arrived, but its size or checksum is wrong; or not exactly one checksum was given.
    """
    path = Path(path)
    if (sha256 is None) == (md5 is None):
        raise ValueError(f"sha256, md5: expected exactly one of the two, got {sha256!r} and {md5!r}")
    kind, expected = ("sha256", sha256) if sha256 is not None else ("md5", str(md5))
    if path.is_file():
        with path.open("rb") as file:
            if _copy(file, None, kind)[1] == expected.lower():
                return path
    with replacing(path) as part:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as reply, part.open("xb") as file:
                got, digest = _copy(reply, file, kind)
                announced = reply.headers.get("Content-Length", got)
            if got != int(announced):
                raise ConnectionError(f"cut short after {got} of {announced} bytes")
        except _NETWORK as error:  # any other OSError, such as a full disk, speaks for itself
            raise ConnectionError(
                f"could not download {url} ({error}). Try again with a network, "
                f"or get that file on another machine and put it at {path}"
            ) from error
        if (size is not None and got != size) or digest != expected.lower():
            wanted = expected if size is None else f"{expected} ({size} bytes)"
            raise ValueError(
                f"{url}: expected {kind} {wanted}, got {digest} ({got} bytes); nothing was kept. "
                f"The publisher changed the file, or a proxy answered in its place"
            )
    return path


def fetch_fashion_mnist(
    root: str | Path = DEFAULT_ROOT, *, url: str = FASHION_URL, md5: dict[str, str] | None = None
) -> Path:
    """Fashion-MNIST (30 MB, MIT licence) into ``root/FashionMNIST/raw``.

    On Debian the package ``dataset-fashion-mnist`` has the same images.

    Args:
        root: as for ``torchvision.datasets.FashionMNIST``.
        url: folder to fetch from, for a mirror.
        md5: checksum of ``<name>.gz`` by name, for a mirror that packed the files again.

    Returns:
        The folder with the four unpacked files.
    """
    folder = Path(root) / "FashionMNIST" / "raw"
    for name, checksum in (FASHION_FILES if md5 is None else md5).items():
        if (folder / name).is_file():
            continue
        packed = download(f"{url}{name}.gz", folder / f"{name}.gz", md5=checksum)
        with replacing(folder / name) as part, gzip.open(packed) as source, part.open("xb") as target:
            shutil.copyfileobj(source, target)
    return folder


def fetch_cifar10(root: str | Path = DEFAULT_ROOT, *, url: str = CIFAR_URL, md5: str | None = None) -> Path:
    """CIFAR-10, python version (163 MB, for research; cite Krizhevsky 2009), into ``root/cifar-10-batches-py``.

    Args:
        root: as for ``torchvision.datasets.CIFAR10``.
        url: folder to fetch from, for a mirror.
        md5: checksum of a mirror's archive, if it differs.

    Returns:
        The folder with the batches.
    """
    return _fetch_archive(CIFAR10, Path(root), url, md5)


def fetch_cifar100(root: str | Path = DEFAULT_ROOT, *, url: str = CIFAR_URL, md5: str | None = None) -> Path:
    """CIFAR-100, python version (161 MB), into ``root/cifar-100-python``; arguments as for :func:`fetch_cifar10`."""
    return _fetch_archive(CIFAR100, Path(root), url, md5)


def fetch_tiny_imagenet(
    root: str | Path = DEFAULT_ROOT, *, url: str = TINY_IMAGENET_URL, md5: str = TINY_IMAGENET_MD5
) -> Path:
    """Tiny-ImageNet (248 MB, for research) into ``root/tiny-imagenet-200``: 200 classes of ImageNet at 64 pixels.

    Args:
        root: the folder to unpack in; the archive stays there too.
        url: address of the archive, for a mirror.
        md5: checksum of a mirror's archive, if it differs.

    Returns:
        The folder with ``wnids.txt``, ``words.txt``, ``train`` and ``val``.
    """
    root = Path(root)
    folder = root / "tiny-imagenet-200"
    if folder.is_dir():  # it appears whole
        return folder
    packed = download(url, root / "tiny-imagenet-200.zip", md5=md5)
    with tempfile.TemporaryDirectory(dir=root, prefix=".tiny-imagenet-200.") as unpacked:
        with zipfile.ZipFile(packed) as archive:
            archive.extractall(unpacked)  # names that lead out of the folder are mended by zipfile
        Path(unpacked, folder.name).rename(folder)
    return folder


def _fetch_archive(archive: Archive, root: Path, url: str, md5: str | None) -> Path:
    folder = root / archive.folder
    if all((folder / name).is_file() for name in archive.files):
        return folder
    packed = download(f"{url}{archive.name}", root / archive.name, md5=archive.md5 if md5 is None else md5)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{archive.folder}.") as unpacked:
        with tarfile.open(packed) as tar:
            for member in tar.getmembers():
                name = Path(member.name)
                if not (member.isfile() or member.isdir()) or name.is_absolute() or ".." in name.parts:
                    raise ValueError(f"{archive.name}: expected files inside its folder, got {member.name!r}")
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # not in Python 3.11.3 and before
            tar.extractall(unpacked)
        folder.mkdir(exist_ok=True)
        for path in Path(unpacked, archive.folder).iterdir():
            os.replace(path, folder / path.name)
    return folder


def _copy(source: IO[bytes] | http.client.HTTPResponse, target: IO[bytes] | None, kind: str) -> tuple[int, str]:
    """Read ``source`` to its end in blocks, into ``target`` if there is one: number of bytes and checksum."""
    count = 0
    digest = hashlib.new(kind, usedforsecurity=False)
    while block := source.read(1 << 20):
        digest.update(block)
        count += len(block)
        if target is not None:
            target.write(block)
    return count, digest.hexdigest()
