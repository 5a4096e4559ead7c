"""The large-scale run of WiSE-FT and BANG, end to end on files laid out like CIFAR-10 and a small timm model."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.testing import assert_close

from peftref.data import Dataset, Split, load
from peftref.fitting import predict
from peftref.merging.bang import fine_tune, outcomes
from peftref.merging.baselines.arithmetic import wise_ft
from peftref.merging.core.loop import merge
from peftref.merging.experiments.bang_at_scale import Upsampled, linear_probe, run_at_scale
from peftref.models import SmallCNN, from_timm
from tests._cifar import lay_cifar10

LOSSES = {"plain": (0.0, None), "BANG": (0.1, 0.5)}


def small() -> tuple[nn.Module, Dataset]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallCNN(width=4).eval()
    return model, load("mnist5k")


def test_probe_is_the_logistic_regression_on_the_features():
    model, digits = small()
    x, y = digits.train.x[::20].double(), digits.train.y[::20]
    probed = linear_probe(model.double(), x, y, decay=1e-2, iterations=300)
    with torch.no_grad():
        h = model.forward_head(model.forward_features(x), pre_logits=True)
    z = (h - h.mean(0)) / (h.std(0) + 1e-6)
    peer = LogisticRegression(C=1 / (2e-2 * len(y)), max_iter=5000, tol=1e-10).fit(z.numpy(), y.numpy())
    want = torch.from_numpy(peer.predict_log_proba(z.numpy()))
    assert_close(predict(probed, x).log_softmax(-1), want, rtol=0, atol=2e-3)


def test_probe_changes_the_head_alone_and_on_a_copy():
    model, digits = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    probed = linear_probe(model, digits.train.x[:200], digits.train.y[:200])
    changed = {name for name, t in probed.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_probe_refuses_a_model_without_a_linear_head():
    class Scaled(SmallCNN):
        def forward(self, x):
            return 2 * super().forward(x)

    _, digits = small()
    with pytest.raises(ValueError, match="model: expected a classifier that ends"):
        linear_probe(Scaled(width=4), digits.train.x[:20], digits.train.y[:20])
    with pytest.raises(ValueError, match="expected at least 10 outputs, got 3"):
        linear_probe(SmallCNN(num_classes=3, width=4), digits.train.x, digits.train.y)


def test_the_table_is_what_its_pieces_give():
    model, digits = small()
    options = {"epochs": 1, "lr": 1e-2, "batch_size": 50, "weight_decay": 0.0}
    where = {"limit": 200, "test_limit": 100, "device": "cpu", "seed": 3}
    table = run_at_scale(model, digits, ["clean"], LOSSES, alphas=[0.0, 0.5, 1.0], **options, **where)
    rows, cols = (
        torch.randperm(len(s.y), generator=torch.Generator().manual_seed(3))[:n]
        for s, n in ((digits.train, 200), (digits.test, 100))
    )
    train, test = (Split(s.x[i], s.y[i]) for s, i in ((digits.train, rows), (digits.test, cols)))
    start = linear_probe(model, *train)
    for loss, (smoothing, mixing) in LOSSES.items():
        tuned = fine_tune(start, *train, smoothing, mixing, seed=3, **options)
        middle = SmallCNN(width=4).eval()
        middle.load_state_dict(merge(start.state_dict(), [tuned.state_dict()], wise_ft(0.5)))
        classes = [predict(m, test.x).argmax(-1) for m in (start, tuned, middle)]
        for alpha, predicted in zip((0.0, 1.0, 0.5), classes, strict=True):
            right = 100 * (predicted == test.y).double().mean().item()
            assert table.loc[(loss, alpha)].iloc[:2].tolist() == pytest.approx([right, right])
        fft = 100 * outcomes(test.y, *classes).loc["FFT", "fraction"]
        assert table.loc[(loss, 0.5), "both wrong, average right (%)"] == pytest.approx(fft)
    assert table.loc[("plain", 0.0)].equals(table.loc[("BANG", 0.0)]), "both lines start at the same network"
    assert table.attrs["protocol"]["train"] == 200 and table.attrs["protocol"]["device"] == "cpu"


def test_upsampling_happens_inside():
    model, digits = small()
    x = digits.test.x[:3]
    large = nn.functional.interpolate(x, (56, 56), mode="bilinear", antialias=True)
    assert_close(Upsampled(model, 56)(x), model(large))


def test_timm_model_on_laid_files_end_to_end(tmp_path):
    cifar = load("cifar10", lay_cifar10(tmp_path, 6))
    model = from_timm("test_vit.r160_in1k", num_classes=10, img_size=64)
    table = run_at_scale(
        model,
        cifar,
        ["clean", "fog"],
        LOSSES,
        alphas=[0.0, 1.0],
        size=64,
        epochs=1,
        limit=100,
        test_limit=30,
        device="cpu",
    )
    assert table.shape == (4, 4) and table.to_numpy().min() >= 0 and table.to_numpy().max() <= 100
    assert table["in distribution (%)"].min() > 30, "levels are easy to tell apart, for a linear probe already"
