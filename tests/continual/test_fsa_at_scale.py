"""The large-scale run of FSA, end to end on files laid out like CIFAR-100 and a small EfficientNet of timm."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from peftref.continual.core.metrics import evaluate
from peftref.continual.core.streams import class_incremental
from peftref.continual.experiments import _fsa_bodies as bodies
from peftref.continual.experiments import fsa
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
        learner, after = FSA(body, kind, ridge=0.1, seed=0, **settings).adapt(*tasks[0].train), []
        for t, task in enumerate(tasks):
            row = evaluate(learner.observe(*task.train), tasks[: t + 1])
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


# --- the recorded run -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def world():
    """70 classes of one colour each, 6 training and 3 validation images, in place of Tiny-ImageNet."""

    def read(root, part, per_class):
        y = torch.arange(70).repeat_interleave({"train": 6, "val": 3}[part])
        return SimpleNamespace(x=(3 * y).byte().view(-1, 1, 1, 1).expand(-1, 3, 64, 64).contiguous(), y=y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "read_tiny_imagenet", read)
        return bodies.World("tiny_imagenet", Path(), classes=9, test=2)


def classes_of(split):
    return [int(round(255 * float(x.mean()) / 3)) for x in split.x]


def test_a_stream_draws_classes_images_and_labels_in_order_of_arrival(world):
    train, test = world.stream(bodies.Arm(seed=3, shots=4), held_out=False)
    assert train.y.tolist() == [c for c in range(9) for _ in range(4)]
    assert test.y.tolist() == [c for c in range(9) for _ in range(2)]
    colours = classes_of(train)
    assert len(set(colours)) == 9 and colours[::4] == colours[3::4] == classes_of(test)[::2]
    again, _ = world.stream(bodies.Arm(seed=3, shots=4), held_out=False)
    assert torch.equal(again.x, train.x)
    other, _ = world.stream(bodies.Arm(seed=4, shots=4), held_out=False)
    assert set(classes_of(other)) != set(colours)


def test_tuning_runs_share_no_class_with_what_is_reported(world):
    reported, tuned = (
        {c for seed in range(30) for c in classes_of(world.stream(bodies.Arm(seed=seed, shots=1), held)[0])}
        for held in (False, True)
    )
    assert not reported & tuned and len(reported) == 10


def test_a_bad_camera_adds_noise_to_training_and_test_images_of_the_same_stream(world):
    clean = world.stream(bodies.Arm(seed=3, shots=2), held_out=False)
    noisy = world.stream(bodies.Arm(seed=3, shots=2, domain="noisy"), held_out=False)
    for a, b in zip(clean, noisy, strict=True):
        assert torch.equal(a.y, b.y) and 0.05 < (a.x - b.x).std() < 0.2
    assert not torch.equal(noisy[0].x[0] - clean[0].x[0], noisy[1].x[0] - clean[1].x[0])


def test_sessions_use_up_the_classes():
    assert bodies.sessions(8, 20) == [(0, 8), (8, 13), (13, 18), (18, 20)]
    assert bodies.sessions(20, 20) == [(0, 20)] and bodies.sessions(4, 6) == [(0, 4), (4, 6)]


def test_what_a_linear_head_forgets_and_what_the_local_loss_saves():
    """Features as after a ReLU, far from the origin: the global loss keeps the last session only."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(8).repeat_interleave(20)
    h = 5 + F.one_hot(y, 8).float() + 0.2 * torch.randn(160, 8, generator=g)
    found = bodies.linear(h, y, h, y, bodies.Arm(seed=0, first=4))
    assert max(found["global"]) < max(found["local"]) - 10


def test_the_sizes_for_a_gpu_end_to_end(tmp_path, monkeypatch):
    """CIFAR-100's own files and a small EfficientNet, in place of the pre-trained one."""
    root = lay(tmp_path)
    monkeypatch.setattr(fsa, "from_timm", lambda tag, **options: small())
    settings = {"seeds": [0, 1], "epochs": 1, "kinds": ["none", "film"], "size": 32}
    found = fsa.run(lambda key, function, *args: function(*args), data=root, large=True, **settings)
    (row,) = found["rows"]
    assert row["claim"] == "film over none, CIFAR-100" and row["seeds"] == 2 and row["where"] == "abstract"
    assert np.shape(found["arrays"]["last"]) == (2, 2)
