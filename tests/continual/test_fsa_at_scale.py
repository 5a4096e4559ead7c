"""The large-scale run of FSA, end to end on files laid out like CIFAR-100 and a small EfficientNet of timm."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from peftref.continual.core.metrics import evaluate
from peftref.continual.core.streams import class_incremental
from peftref.continual.experiments.fsa_at_scale import Enlarged, run_at_scale
from peftref.continual.fsa import FSA, embed
from peftref.data import load
from peftref.models import Normalised, SmallCNN, pretrained

QUICK = {"epochs": 1, "batch_size": 16}


def lay(root: Path, each: int = 2) -> Path:
    """CIFAR-100's own files, shortened: two colours of an image say its class."""
    rng, folder = np.random.default_rng(0), root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        y = np.tile(np.arange(100), each)
        x = rng.integers(0, 20, (len(y), 3, 1024)) + 23 * np.stack([y // 10, y % 10, 0 * y], 1)[..., None]
        labels = {b"fine_labels": y.tolist(), b"coarse_labels": (y // 5).tolist()}
        (folder / name).write_bytes(pickle.dumps({b"data": x.reshape(-1, 3072).astype(np.uint8), **labels}))
    names = [f"class {k}".encode() for k in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names, b"coarse_label_names": names[:20]}))
    return root


def small() -> Normalised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("efficientnet_b0", pretrained=False, num_classes=0)
    return Normalised(net, (0.5,) * 3, (0.5,) * 3).eval()


def test_the_table_is_what_its_pieces_give():
    data, body = load("digits"), pretrained("fashion8k")
    table = run_at_scale(body, data, [4, 2, 4], {"none": {}, "full": QUICK}, per_class=20, ridge=0.1, device="cpu")
    tasks = class_incremental(data, [4, 2, 4], per_class=20)
    for kind, settings in (("none", {}), ("full", QUICK)):
        fsa, after = FSA(body, kind, ridge=0.1, seed=0, **settings).adapt(*tasks[0].train), []
        for t, task in enumerate(tasks):
            row = evaluate(fsa.observe(*task.train), tasks[: t + 1])
            n = torch.tensor([len(s.test.y) for s in tasks[: t + 1]])
            after.append(float((row * n).sum() / n.sum()))
        assert table.loc[kind, "last (%)"] == pytest.approx(after[-1])
        assert table.loc[kind, "mean over sessions (%)"] == pytest.approx(np.mean(after))
    assert table["trained"].tolist() == [0, sum(p.numel() for p in body.parameters())]
    protocol = table.attrs["protocol"]
    assert protocol["sessions"] == [4, 2, 4] and protocol["per_class"] == 20 and protocol["device"] == "cpu"


def test_enlarging_happens_inside():
    net, x = small(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        large = torch.nn.functional.interpolate(x, (48, 48), mode="bicubic", antialias=True).clamp(0, 1)
        assert_close(embed(Enlarged(net, 48), x), embed(net, large))


def test_timm_model_on_laid_files_end_to_end(tmp_path):
    data, net = load("cifar100", lay(tmp_path)), small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bodies = {"none": {}, "film": QUICK, "full": QUICK}
    table = run_at_scale(net, data, [20, 80], bodies, size=40, ridge=1e-6, device="cpu")
    assert table.index.tolist() == ["none", "film", "full"] and table.shape == (3, 4)
    assert table["trained"].tolist() == [0, 20_544, sum(p.numel() for p in net.parameters())]
    assert table.loc["none", "last (%)"] > 80, "two colours tell a hundred classes apart, for random features already"
    assert table["last (%)"].nunique() == 3, "each body is another one (one epoch from random weights helps none)"
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the model given is never changed"


def test_a_stream_that_does_not_use_up_the_classes_is_refused():
    with pytest.raises(ValueError, match="tasks: expected positive sizes"):
        run_at_scale(SmallCNN(width=4), load("digits"), [4, 2], {"none": {}}, device="cpu")
