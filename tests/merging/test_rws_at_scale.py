"""The large-scale harness, end to end on small files: its steps one by one, and that its table is what they give."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftref.data import Dataset, Split, corrupt, load
from peftref.merging import apply, first, signature, units
from peftref.merging.experiments import rws_at_scale as at_scale
from peftref.merging.experiments.corrupted import accuracy
from peftref.merging.experiments.rws_at_scale import cifar_start, run_at_scale, tune
from peftref.models import PlainCNN, SmallCNN


def lay(root: Path, n: int = 20) -> Path:
    """CIFAR-10 as its authors pack it: five training batches and one of test images; their level tells the class."""
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        y = np.arange(n) % 10
        x = (rng.integers(0, 60, (n, 3072)) + 20 * y[:, None]).clip(0, 255).astype(np.uint8)
        (root / name).write_bytes(pickle.dumps({b"data": x, b"labels": y.tolist()}))
    (root / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}))
    return root


def small(n: int = 60, channels: int = 1) -> Dataset:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, channels, 28, 28, generator=g), torch.arange(n) % 10
    x = (x * 0.3 + 0.07 * y.view(-1, 1, 1, 1)).mul(255).round().div(255)
    return Dataset("toy", Split(x, y), Split(x[:30], y[:30]), tuple("0123456789"), "none")


def seeded(make, **options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**options)


def test_tuning_learns_repeats_and_leaves_the_start():
    data, start = small(), seeded(PlainCNN, width=2).eval()
    before = {name: t.clone() for name, t in start.state_dict().items()}
    a, b, c = (tune(start, data.train, 2, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(t, start.state_dict()[name]) for name, t in before.items()) and not start.training
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], c[n]) for n in a)
    assert not all(torch.equal(a[n], before[n]) for n in a)


def test_images_are_corrupted_as_everywhere_and_kept_in_8_bits():
    data = small()
    seen = at_scale._see(data.test, "contrast", 3, "x", "cifar", torch.device("cpu"))
    assert seen.x.dtype == torch.uint8
    assert_close(seen.x.float() / 255, corrupt(data.test.x, "contrast", 3))


def test_table_is_what_its_steps_give():
    data, start = small(), seeded(PlainCNN, width=4)
    table = run_at_scale(start, data, ["contrast"], [2, 5], severity=3, epochs=3, device="cpu")
    cpu = torch.device("cpu")
    seen, learned = (at_scale._see(part, "contrast", 3, "", "cifar", cpu) for part in (data.test, data.train))
    clean, robust = (tune(start, part, 3) for part in (data.train, learned))
    floats = Split(seen.x.float() / 255, seen.y)
    states = [net.state_dict() for net in (start, clean, robust)]
    for k in (2, 5):
        for name, project in (("signature", True), ("difference", False)):
            state = apply(clean.state_dict(), signature(*states, first(units(start), k), project=project))
            row = table.loc[("contrast", f"{name}, K = {k}")]
            assert row.tolist() == pytest.approx([accuracy(start, state, data.test), accuracy(start, state, floats)])
    assert table.loc[("contrast", "robust"), "corrupted"] == pytest.approx(accuracy(robust, {}, floats))
    assert table.loc[("contrast", "clean"), "clean"] == pytest.approx(accuracy(clean, {}, data.test))
    assert table.attrs["protocol"]["severity"] == 3


def test_strength_zero_is_the_clean_network():
    start, options = seeded(PlainCNN, width=2), {"severity": 1, "epochs": 1, "device": "cpu"}
    table = run_at_scale(start, small(), ["fog"], [3], strength=0.0, **options)
    assert table.loc[("fog", "signature, K = 3")].tolist() == table.loc[("fog", "clean")].tolist()


def test_batchnorm_goes_through_the_papers_procedure():
    """All layers, no projection: the robust network with the clean head, its statistics from the corrupted images."""
    data, start = small(), seeded(SmallCNN, width=2)
    seen = at_scale._see(data.train, "contrast", 3, "", "cifar", torch.device("cpu"))
    clean, robust = tune(start, data.train, 2), tune(start, seen, 2)
    rho = signature(*(net.state_dict() for net in (start, clean, robust)), first(units(start), 5), project=False)
    net = at_scale._patched(clean, rho, robust.state_dict(), seen, 1.0)
    for name, t in net.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            source = clean if name.startswith("fc") else robust
            assert_close(t, source.state_dict()[name], rtol=0, atol=1e-6)
    with torch.no_grad():
        first_layer = robust.stages[0][0](seen.x.float() / 255)
    assert_close(net.stages[0][1].running_mean, first_layer.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_a_vgg_keeps_its_convolutions_only():
    net = seeded(cifar_start, tag="vgg11.tv_in1k", num_classes=7, pretrained=False).eval()
    assert len(units(net)) == 8
    assert sum(p.numel() for p in net.parameters()) < 10e6  # 129 million with its two wide layers
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("tag", ["vgg11.tv_in1k", "resnet10t.c3_in1k"])
def test_timm_model_on_laid_files_end_to_end(tmp_path, tag):
    data = load("cifar10", lay(tmp_path))
    assert data.train.x.shape == (100, 3, 32, 32)
    start = seeded(cifar_start, tag=tag, pretrained=False)
    table = run_at_scale(start, data, ["clean", "contrast"], [1, 99], severity=3, epochs=1, device="cpu")
    assert table.shape == (12, 2) and table.to_numpy().min() >= 0 and table.to_numpy().max() <= 100
