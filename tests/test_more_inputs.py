"""Labels, precisions and images as they come from elsewhere."""

import pytest
import torch
from torch import nn

from peftref.continual import EWC, class_incremental, learn
from peftref.data import Dataset, Split, corrupt, load
from peftref.fitting import fit, train
from peftref.models import pretrained
from peftref.tta import BNAdapt, CoTTA, Tent

D = load("digits")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    found = []
    for y in (D.test.y[:60], D.test.y[:60].to(dtype)):
        model = fit(net(), D.test.x[:60], y, epochs=1)
        train(model, D.test.x[:60], y, lr=0.01, steps=3)
        part = Split(D.test.x[:60], y)
        tasks = class_incremental(Dataset("digits", part, part, D.classes, D.sha256), 5)
        learn(model, tasks, EWC(1.0), lr=0.01)
        found.append(model)
    for p, q in zip(*(model.parameters() for model in found), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", [fit, lambda *a: train(*a, lr=0.01, steps=2)])
def test_a_broken_image_is_refused(how) -> None:
    x = D.test.x[:20].clone()
    x[3] = torch.nan
    model = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="x: expected finite entries, got 64"):
        how(model, x, D.test.y[:20])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_rows_that_are_no_images_are_not_shifted() -> None:
    with pytest.raises(ValueError, match=r"x: expected images \(N, C, H, W\), got shape \(9, 8\)"):
        fit(nn.Linear(8, 2), torch.randn(9, 8), torch.arange(9) % 2)


@pytest.mark.parametrize("method", [Tent, lambda m: CoTTA(m, n_views=0, symmetric=True)])
def test_a_step_that_float16_cannot_hold_changes_nothing(method) -> None:
    x = load("fashion8k").test.x[:64].half()
    adapted = method(pretrained("fashion8k").half())
    before = {name: t.clone() for name, t in adapted.named_parameters()}
    with pytest.raises(FloatingPointError, match="model: expected weights that stay finite"):
        adapted(x)
    assert all(torch.equal(t, before[name]) for name, t in adapted.named_parameters())


def test_statistics_of_half_precision_are_taken_in_float32() -> None:
    layer = nn.Sequential(nn.BatchNorm2d(1)).eval()
    x = 300 * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = BNAdapt(layer.half(), 0.5)(x.half())
    torch.testing.assert_close(found.float(), BNAdapt(layer.float(), 0.5)(x), rtol=2e-3, atol=2e-3)


def test_rounding_beyond_the_range_is_no_reason_to_refuse() -> None:
    x = torch.full((1, 1, 8, 8), 1.0000001)
    assert torch.equal(corrupt(x, "fog", 1, seed=0), corrupt(torch.ones(1, 1, 8, 8), "fog", 1, seed=0))
    with pytest.raises(ValueError, match="x: expected values in"):
        corrupt(x + 0.1, "fog", 1)
