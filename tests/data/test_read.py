"""Parsers of image files, on files made here byte by byte from the published descriptions of the formats."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peftref.data.read import read_cifar_binary, read_cifar_c, read_cifar_names, read_cifar_python, read_idx

IDX_CODES = {"uint8": 8, "int8": 9, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, IDX_CODES[array.dtype.name], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def cifar(n: int = 7, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), rng.integers(0, classes, n, dtype=np.uint8)


def pickled(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=2))  # protocol 2: what the official files use
    return path


@settings(deadline=None)  # timings on a shared machine say nothing
@given(
    st.sampled_from(sorted(IDX_CODES)).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(max_dims=4, max_side=5))),
    st.booleans(),
)
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, zipped: bool) -> None:
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    got = read_idx(path)
    assert got.dtype == array.dtype and got.dtype.isnative
    np.testing.assert_array_equal(got, array)


def test_idx_of_the_published_example(tmp_path: Path) -> None:
    """The label file of MNIST starts 00 00 08 01 (magic 2049), count, then one byte per label."""
    (tmp_path / "labels").write_bytes(bytes.fromhex("00000801 00000003 050004"))
    assert read_idx(tmp_path / "labels").tolist() == [5, 0, 4]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "magic number"),
        (b"\x89PNG\r\n\x1a\n", "magic number"),
        (b"\0\0\x07\x01\0\0\0\0", "magic number"),  # no such element type
        (b"\0\0\x08\x03\0\0\0\x01", "header of 16 bytes"),
        (b"\0\0\x08\x01\0\0\0\x03ab", "expected 3 data bytes .* got 2"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", "expected 3 data bytes .* got 4"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x03abc", mtime=0)[:-9], "damaged"),
        (b"\x1f\x8bnot gzip at all", "damaged"),
    ],
)
def test_bad_idx_is_refused_by_name(tmp_path: Path, body: bytes, message: str) -> None:
    (tmp_path / "broken-idx").write_bytes(body)
    with pytest.raises(ValueError, match=f"broken-idx.*{message}"):
        read_idx(tmp_path / "broken-idx")


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary_and_python_versions_agree(tmp_path: Path, classes: int) -> None:
    x, y = cifar(classes=classes)
    coarse = [b"\x09"] if classes == 100 else []
    records = b"".join(b"".join([*coarse, bytes([k]), image.tobytes()]) for image, k in zip(x, y, strict=True))
    (tmp_path / "b.bin").write_bytes(records)
    key = "labels" if classes == 10 else "fine_labels"
    batch = {"data": x.reshape(len(x), -1), key: y.tolist(), "coarse_labels": [9] * len(y), "filenames": ["a.png"]}
    for read, path in ((read_cifar_binary, tmp_path / "b.bin"), (read_cifar_python, tmp_path / "b")):
        if read is read_cifar_python:
            pickled(path, {k.encode(): v for k, v in batch.items()})
        images, labels = read(path, classes)
        np.testing.assert_array_equal(images, x)
        np.testing.assert_array_equal(labels, y)


def test_cifar_python_reads_what_python_2_wrote(tmp_path: Path) -> None:
    """The official batches name ``numpy.core.multiarray`` and hold byte strings; written here opcode by opcode."""
    x, y = cifar(2)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"  # an empty array, then its state:
        b"(I1\n(I2\nI3072\ntcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\n"
        b"T" + struct.pack("<i", x.size) + x.tobytes() + b"tb"
    )
    labels = b"(lp1\n" + b"".join(b"I%d\na" % k for k in y)
    (tmp_path / "batch").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u.")
    images, got = read_cifar_python(tmp_path / "batch")
    np.testing.assert_array_equal(images, x)
    np.testing.assert_array_equal(got, y)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    path = pickled(tmp_path / "batch", {b"data": Bomb(tmp_path / "boom"), b"labels": []})
    pickle.loads(path.read_bytes())  # an ordinary unpickler does what the file says
    assert (tmp_path / "boom").exists()
    (tmp_path / "boom").unlink()
    with pytest.raises(ValueError, match="batch.*could not read it.*names"):
        read_cifar_python(path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy"])
def test_only_the_names_of_an_array_are_resolved(tmp_path: Path, module: str) -> None:
    """An allowed module is not an allowed name: ``numpy.load`` could read other files."""
    (tmp_path / "batch").write_bytes(f"c{module}\nfromfile\n.".encode())
    with pytest.raises(ValueError, match=f"{module}.fromfile"):
        read_cifar_python(tmp_path / "batch")


def test_bad_cifar_files_are_refused(tmp_path: Path) -> None:
    x, y = cifar(2)
    (tmp_path / "cut.bin").write_bytes(bytes(3073 + 3000))
    with pytest.raises(ValueError, match="cut.bin.*records of 3073 bytes, got 6073"):
        read_cifar_binary(tmp_path / "cut.bin")
    (tmp_path / "empty.bin").touch()
    with pytest.raises(ValueError, match="empty.bin.*got 0"):
        read_cifar_binary(tmp_path / "empty.bin")
    (tmp_path / "label.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(ValueError, match="label.bin.*labels from 0 to 9, got 10"):
        read_cifar_binary(tmp_path / "label.bin")
    with pytest.raises(ValueError, match="classes: expected 10 or 100, got 20"):
        read_cifar_binary(tmp_path / "label.bin", 20)
    with pytest.raises(ValueError, match="expected a pickled dictionary.*got list"):
        read_cifar_python(pickled(tmp_path / "list", [1]))
    with pytest.raises(ValueError, match="'labels', got keys"):
        read_cifar_python(pickled(tmp_path / "fine", {b"data": x.reshape(2, -1), b"fine_labels": y.tolist()}))
    with pytest.raises(ValueError, match=r"got uint8 \(2, 3072\) and int64 \(1,\)"):
        read_cifar_python(pickled(tmp_path / "short", {b"data": x.reshape(2, -1), b"labels": [1]}))
    whole = pickled(tmp_path / "whole", {b"data": x.reshape(2, -1), b"labels": y.tolist()}).read_bytes()
    (tmp_path / "torn").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="torn.*could not read it"):
        read_cifar_python(tmp_path / "torn")
    with pytest.raises(FileNotFoundError):
        read_cifar_python(tmp_path / "absent")


def test_class_names_of_both_versions(tmp_path: Path) -> None:
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    pickled(tmp_path / "batches.meta", {b"label_names": [b"airplane", b"automobile"]})
    pickled(tmp_path / "meta", {b"fine_label_names": [b"apple"], b"coarse_label_names": [b"fruit"]})
    assert read_cifar_names(tmp_path / "batches.meta.txt") == ("airplane", "automobile")
    assert read_cifar_names(tmp_path / "batches.meta") == ("airplane", "automobile")
    assert read_cifar_names(tmp_path / "meta") == ("apple",)
    with pytest.raises(ValueError, match="label_names"):
        read_cifar_names(pickled(tmp_path / "other", {b"data": []}))


def test_cifar_c_takes_the_rows_of_the_severity(tmp_path: Path) -> None:
    x, y = cifar(15)
    np.save(tmp_path / "fog.npy", x.transpose(0, 2, 3, 1))
    np.save(tmp_path / "labels.npy", y.astype(np.int64))
    images, labels = read_cifar_c(tmp_path, "fog", 2)
    np.testing.assert_array_equal(images, x[3:6])
    np.testing.assert_array_equal(labels, y[3:6])
    with pytest.raises(ValueError, match="severity: expected an integer from 1 to 5, got 0"):
        read_cifar_c(tmp_path, "fog", 0)
    np.save(tmp_path / "fog.npy", x)  # channels first: not the published layout
    with pytest.raises(ValueError, match=r"fog.npy: expected uint8 \(5n, 32, 32, 3\)"):
        read_cifar_c(tmp_path, "fog", 1)
    np.save(tmp_path / "fog.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        read_cifar_c(tmp_path, "fog", 1)
