"""The large-scale harness, end to end on small files: labels of a folder, and that its stream is the book's stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from peftref.data import Split, continual
from peftref.data.orders import shuffled, sorted_by_class
from peftref.models import SmallCNN, from_timm
from peftref.tta.baselines.bn_adapt import BNAdapt
from peftref.tta.baselines.tent import Tent
from peftref.tta.experiments import at_scale
from peftref.tta.experiments.at_scale import imagenet_folder, run_at_scale
from peftref.tta.experiments.evaluate import error_by_domain, run
from peftref.tta.lame import LAME

SYNSETS = ("n01443537", "n02102040", "n03000684")  # goldfish 1, springer spaniel 217, chain saw 491
METHODS = {"source": lambda net: net, "BN-adapt": BNAdapt, "TENT": Tent, "LAME": LAME}


def lay(root: Path, folders: tuple[str, ...], each: int = 4) -> Path:
    """Small JPEG files, wider than high, whose level says which folder they are in."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(folders):
        (root / name).mkdir(parents=True)
        for j in range(each):
            noise = rng.integers(0, 50, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(noise + np.uint8(60 * i)).save(root / name / f"{j}.JPEG")
    return root


def test_labels_are_those_of_imagenet_models_even_for_some_of_the_classes(tmp_path):
    data = imagenet_folder(lay(tmp_path, SYNSETS), size=16)
    assert data.x.shape == (12, 3, 16, 16) and data.x.dtype == torch.float32
    assert data.y.tolist() == [1] * 4 + [217] * 4 + [491] * 4
    assert data.x.mean((1, 2, 3)).diff()[[3, 7]].gt(0.1).all(), "images and labels belong together"


def test_other_names_are_numbered_and_a_limit_is_balanced(tmp_path):
    data = imagenet_folder(lay(tmp_path, ("cat", "dog", "n1")), size=8, limit=6)
    assert data.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(imagenet_folder(tmp_path, size=8, limit=99).y) == 12


def test_crop_is_resize_to_256_and_central_224(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = np.broadcast_to(np.linspace(0, 255, 512, dtype=np.uint8), (256, 512))
    Image.fromarray(ramp).save(tmp_path / "a" / "grey.png")  # a grey file becomes three channels
    x = imagenet_folder(tmp_path, size=224).x[0]
    assert_close(x, torch.from_numpy(ramp[16:240, 144:368].copy()).float().div(255).expand(3, -1, -1), rtol=0, atol=0)


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="root: expected folders of JPEG"):
        imagenet_folder(tmp_path)
    with pytest.raises(ValueError, match="size, limit"):
        imagenet_folder(tmp_path, limit=0)
    with pytest.raises(ValueError, match="domains: expected"):
        run_at_scale(METHODS, SmallCNN(), Split(torch.rand(4, 1, 28, 28), torch.arange(4)), ["rain"], 3, 2)


@pytest.mark.parametrize("order", [None, shuffled, sorted_by_class])
def test_is_the_continual_protocol(order):
    g = torch.Generator().manual_seed(0)
    data = Split(torch.rand(60, 1, 28, 28, generator=g), torch.randint(10, (60,), generator=g))
    data = Split(data.x.mul(255).floor().div(255), data.y)  # images of 8-bit files
    model, domains = SmallCNN().eval(), ["gaussian_noise", "clean", "shot_noise"]
    methods = METHODS | {"TENT": lambda net: Tent(net, lr=0.1)}
    table = run_at_scale(methods, model, data, domains, 3, 20, order, device="cpu", seed=1, table="cifar")
    stream = continual(data, domains, 3, order=order, batch_size=20, seed=1)
    for name, wrap in methods.items():
        assert_close(table[name].tolist(), error_by_domain(run(wrap(model), stream)).tolist())
    assert table.attrs["protocol"]["order"] == (order.__name__ if order else "as_stored")


def test_blocks_do_not_repeat_their_noise(monkeypatch):
    monkeypatch.setattr(at_scale, "BLOCK", 2)
    x = at_scale._corrupted(torch.full((4, 1, 8, 8), 0.5), "gaussian_noise", 5, 0, "cifar", torch.device("cpu"))
    assert x.dtype == torch.uint8 and len(x) == 4 and not torch.equal(x[:2], x[2:])


def test_timm_model_on_laid_files_end_to_end(tmp_path):
    data = imagenet_folder(lay(tmp_path, SYNSETS), size=32)
    model = from_timm("resnet10t.c3_in1k")
    table = run_at_scale(METHODS, model, data, ["clean", "fog"], 3, 4, sorted_by_class, device="cpu")
    assert table.shape == (2, 4) and table.to_numpy().min() >= 0 and table.to_numpy().max() <= 100
