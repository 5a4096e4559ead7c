"""The large-scale run of LAE, end to end on files laid out like CIFAR-100 and a small timm model."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from peftref.at_scale import random_crop
from peftref.continual.experiments.lae_at_scale import PETS, Centred, run_at_scale
from peftref.data import load
from peftref.models import from_timm
from peftref.models.vit import pretrained_vit


def lay(root: Path, each: int = 6) -> Path:
    """CIFAR-100's own files, shortened: the level of an image says its class."""
    rng, folder = np.random.default_rng(0), root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        y = np.tile(np.arange(100), each)
        x = rng.integers(0, 40, (len(y), 3072)) + 2 * y[:, None]
        record = {b"data": x.astype(np.uint8), b"fine_labels": y.tolist(), b"coarse_labels": (y // 5).tolist()}
        (folder / name).write_bytes(pickle.dumps(record))
    names = {b"fine_label_names": [f"class {k}".encode() for k in range(100)], b"coarse_label_names": [b"x"] * 20}
    (folder / "meta").write_bytes(pickle.dumps(names))
    return root


def test_timm_model_on_laid_files_end_to_end(tmp_path):
    cifar = load("cifar100", lay(tmp_path))
    model = from_timm("test_vit.r160_in1k", img_size=64).model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(0)
    options = {"tasks": 2, "blocks": [0, 1], "size": 64, "epochs": 2, "frozen_epochs": 1, "limit": 2, "test_limit": 1}
    table = run_at_scale(model, cifar, "Prefix", device="cpu", **options)
    assert table.shape == (2, 3) and table.to_numpy().min() >= 0 and table.to_numpy().max() <= 100
    protocol = table.attrs["protocol"]
    assert protocol["pet"] == "Prefix" and protocol["blocks"] == [0, 1] and protocol["device"] == "cpu"
    assert table.loc[1, "online (%)"] == table.loc[1, "ensemble (%)"]  # no offline copy in the first task
    kept = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    assert all(torch.equal(kept[n], t) for n, t in before.items())


@pytest.mark.parametrize("pet", PETS)
def test_every_module_learns_the_first_task(pet):
    torch.manual_seed(0)
    options = {"tasks": 5, "blocks": range(4), "size": 28, "limit": 48, "test_limit": 10, "frozen_epochs": 2}
    table = run_at_scale(pretrained_vit(), load("mnist5k"), pet, epochs=3, augmented=False, device="cpu", **options)
    assert len(table) == 5 and table.loc[1, "ensemble (%)"] > 70


def test_images_are_enlarged_and_cut_in_the_middle():
    net = pretrained_vit()
    model, x = Centred(net, 28), torch.rand(2, 1, 20, 20)
    large = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)[..., 2:30, 2:30]
    with torch.no_grad():
        assert_close(model.forward_features(x), net.forward_features(large))
        own = torch.rand(2, 1, 28, 28)
        assert torch.equal(model.forward_features(own), net.forward_features(own))


def test_crops():
    x = torch.rand(64, 3, 16, 16)
    a, b = (random_crop(x, 24, torch.Generator().manual_seed(seed)) for seed in (0, 0))
    assert a.shape == (64, 3, 24, 24) and torch.equal(a, b)
    assert x.min() <= a.min() and a.max() <= x.max()
    ramp = torch.arange(16.0).expand(64, 1, 16, 16)  # across the image: a mirrored crop falls
    slope = random_crop(ramp, 16, torch.Generator().manual_seed(0)).diff(dim=-1).mean((1, 2, 3))
    assert 16 < (slope < 0).sum() < 48 and slope.abs().max() < 1.01 and slope.abs().min() > 0.1
    whole = random_crop(x, 16, torch.Generator().manual_seed(0), smallest=1.0)
    assert whole.shape == x.shape


def test_unknown_modules_are_refused():
    with pytest.raises(ValueError, match="pet: expected one of"):
        run_at_scale(pretrained_vit(), load("mnist5k"), "prompt")
