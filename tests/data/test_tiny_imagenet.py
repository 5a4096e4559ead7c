"""Tiny-ImageNet: a small tree of the published layout is read as it lies; what is missing or damaged is named."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peftref.data import fetch_tiny_imagenet, load, read_tiny_imagenet

WNIDS = ("n02123045", "n01443537")  # unsorted, as in the published file
PER_CLASS = {"train": 12, "val": 3}


def photograph(path: Path, level: int, mode: str = "RGB", side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side), level if mode == "L" else (level, 0, 255 - level)).save(path, "JPEG", quality=95)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-imagenet-200"
    lines = []
    for k, wnid in enumerate(WNIDS):
        for i in range(PER_CLASS["train"]):
            photograph(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 100 * k + 8 * i)
        for i in range(PER_CLASS["val"]):
            name = f"val_{2 * i + k}.JPEG"
            photograph(folder / "val" / "images" / name, 100 * k + 8 * i, "L" if i == 2 else "RGB")
            lines.append((2 * i + k, f"{name}\t{wnid}\t0\t0\t63\t63\n"))
    (folder / "val" / "val_annotations.txt").write_text("".join(line for _, line in sorted(lines)))
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    (folder / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn02123045\ttabby, tabby cat\n")
    return tmp_path


def test_classes_are_numbered_by_name_and_images_keep_their_labels(root: Path) -> None:
    val = read_tiny_imagenet(root)
    assert val.wnids == ("n01443537", "n02123045") and val.words == ("goldfish", "tabby")
    assert val.x.shape == (6, 3, 64, 64) and val.x.dtype == torch.uint8
    assert val.y.tolist() == [1, 0, 1, 0, 1, 0]  # val_0 is a tabby, val_1 a goldfish ...
    assert (val.x[:4, 0].float().mean((1, 2)) - torch.tensor([0.0, 100.0, 8.0, 108.0])).abs().max() < 3
    assert (val.x[4, 0] == val.x[4, 2]).all()  # a grey photograph has three equal channels


def test_training_images_are_in_the_order_of_their_numbers(root: Path) -> None:
    train = read_tiny_imagenet(root / "tiny-imagenet-200", "train")  # the set's own folder does as well
    assert train.y.tolist() == [0] * 12 + [1] * 12
    red = train.x[:, 0].float().mean((1, 2))
    assert (red[:12].diff() > 0).all() and (red[12:].diff() > 0).all()  # _2 before _10
    assert read_tiny_imagenet(root, "train", per_class=5).y.tolist() == [0] * 5 + [1] * 5
    assert torch.equal(read_tiny_imagenet(root, "train", per_class=5).x[5:], train.x[12:17])


def test_load_gives_the_usual_form(root: Path) -> None:
    data = load("tiny_imagenet", root)
    assert data.classes == ("goldfish", "tabby") and data.wnids == ("n01443537", "n02123045")
    assert data.train.x.shape == (24, 3, 64, 64) and data.train.x.dtype == torch.float32
    assert data.train.y.bincount().tolist() == [12, 12] and data.train.y.tolist() != sorted(data.train.y.tolist())
    assert torch.equal(data.test.x, read_tiny_imagenet(root).x.float() / 255)
    assert data.train.x.max() <= 1 and len(data.sha256) == 64


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"peftref\.data\.fetch_tiny_imagenet\("):
        load("tiny_imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"wnids\.txt"):
        read_tiny_imagenet(tmp_path)


def test_what_is_missing_or_damaged_is_named(root: Path) -> None:
    folder = root / "tiny-imagenet-200"
    image = folder / "val" / "images" / "val_3.JPEG"
    body = image.read_bytes()
    for damaged in (body[: len(body) // 2], b"no photograph"):
        image.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"val_3\.JPEG: expected a whole JPEG"):
            read_tiny_imagenet(root)
    photograph(image, 3, side=32)
    with pytest.raises(ValueError, match=r"val_3\.JPEG: expected 64 x 64 pixels, got 32 x 32"):
        read_tiny_imagenet(root)
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"val_3\.JPEG: expected"):
        read_tiny_imagenet(root)
    shutil.rmtree(folder / "train" / WNIDS[0])
    with pytest.raises(FileNotFoundError, match=rf"{WNIDS[0]}.images: expected JPEG files"):
        read_tiny_imagenet(root, "train")


@pytest.mark.parametrize("line", ["val_0.JPEG\tn99999999\t0", "val_0.JPEG", ""])
def test_bad_annotations(root: Path, line: str) -> None:
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(line)
    with pytest.raises(ValueError, match=r"val_annotations\.txt: expected"):
        read_tiny_imagenet(root)


@pytest.mark.parametrize(("part", "per_class"), [("test", None), ("val", 0), ("val", True)])
def test_bad_arguments(root: Path, part: str, per_class: int | None) -> None:
    with pytest.raises(ValueError, match=r"(part|per_class): expected"):
        read_tiny_imagenet(root, part, per_class)


def test_fetched_sets_are_checked_and_unpacked_once(root: Path, tmp_path: Path) -> None:
    packed = Path(shutil.make_archive(str(tmp_path / "archive"), "zip", root, "tiny-imagenet-200"))
    md5 = hashlib.md5(packed.read_bytes()).hexdigest()
    target = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="expected md5"):
        fetch_tiny_imagenet(target, url=packed.as_uri())
    assert not any(path.is_file() for path in target.rglob("*"))
    folder = fetch_tiny_imagenet(target, url=packed.as_uri(), md5=md5)
    assert np.array_equal(read_tiny_imagenet(target).x, read_tiny_imagenet(root).x)
    (folder / "mark").touch()
    assert fetch_tiny_imagenet(target, url="http://nowhere.invalid/") == folder and (folder / "mark").exists()
