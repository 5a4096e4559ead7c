"""Balanced averaging: targets against torch, timm, torchvision and loops; the measures; WiSE-FT's own oracles."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm.data.mixup
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.transforms import v2

from peftref.merging.bang import (
    bang_loss,
    calibration_error,
    confidence,
    fine_tune,
    mixup,
    outcomes,
    smooth,
    soft_cross_entropy,
)
from peftref.merging.baselines.arithmetic import fisher_wise_ft, wise_ft
from peftref.merging.core.loop import merge
from tests._naive.bang import loop_calibration_error, loop_outcomes, loop_soft_cross_entropy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 12, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, one-hot targets and classes."""
    g = generator(seed)
    y = torch.randint(classes, (n,), generator=g)
    return torch.randn(n, classes, generator=g, dtype=torch.double), F.one_hot(y, classes).double(), y


def net(seed: int = 0, inputs: int = 6, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))


def task(n: int = 200, inputs: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    y = torch.randint(classes, (n,), generator=g)
    return torch.randn(classes, inputs, generator=g)[y] + 0.7 * torch.randn(n, inputs, generator=g), y


# --- targets and their loss -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.7])
def test_smoothing_is_torchs(eps):
    logits, hot, y = batch()
    ours = soft_cross_entropy(logits, smooth(hot, eps))
    assert_close(ours, F.cross_entropy(logits, y, label_smoothing=eps))
    assert_close(smooth(hot, eps).sum(-1), torch.ones(12, dtype=torch.double))


def test_loss_is_torchs_and_the_loops():
    logits, hot, _ = batch()
    soft = torch.rand(12, 4, generator=generator(), dtype=torch.double)
    soft /= soft.sum(-1, keepdim=True)
    for targets in (hot, soft):
        assert_close(soft_cross_entropy(logits, targets), F.cross_entropy(logits, targets))
    expected = loop_soft_cross_entropy(logits.tolist(), soft.tolist())
    assert soft_cross_entropy(logits, soft).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_is_probability_minus_target():
    logits, hot, _ = batch()
    targets = smooth(hot, 0.3)
    logits.requires_grad_()
    soft_cross_entropy(logits, targets).backward()
    assert_close(logits.grad, (logits.softmax(-1) - targets).detach() / len(logits))


def test_smoothing_and_mixing_commute():
    x, (_, hot, _) = torch.randn(12, 3, generator=generator()), batch()
    after = smooth(mixup(x, hot, generator=generator(3))[1], 0.2)
    before = mixup(x, smooth(hot, 0.2), generator=generator(3))[1]
    assert_close(after, before)


# --- mixup ------------------------------------------------------------------------------------------------------------
def partners(n: int, seed: int) -> tuple[float, Tensor]:
    """nu and partners of a seed, read off mixed rows of the identity: row i is nu e_i + (1 - nu) e_j."""
    e = torch.eye(n, dtype=torch.double)
    mixed, _ = mixup(e, e, 1.0, generator=generator(seed))
    alone = mixed.diagonal() == 1
    nu = mixed.diagonal()[~alone][0].item()
    others = (mixed - torch.diag(mixed.diagonal())).argmax(-1)
    return nu, torch.where(alone, torch.arange(n), others)


def test_loss_of_mixed_targets_is_the_mixed_loss():
    nu, j = partners(12, seed=5)
    assert 0 < nu < 1 and torch.equal(j.sort().values, torch.arange(12)) and not torch.equal(j, torch.arange(12))
    x, (logits, hot, y) = torch.randn(12, 3, generator=generator(), dtype=torch.double), batch()
    mixed, targets = mixup(x, hot, 1.0, generator=generator(5))
    assert_close(mixed, nu * x + (1 - nu) * x[j])  # one nu for the batch, the same for x and y
    expected = nu * F.cross_entropy(logits, y) + (1 - nu) * F.cross_entropy(logits, y[j])
    assert_close(soft_cross_entropy(logits, targets), expected)


class FixedPartners:
    """torch.randperm that returns what a peer pairs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, partner: Tensor) -> None:
        monkeypatch.setattr("peftref.merging.bang.torch.randperm", lambda n, **_: partner)


def test_torchvision_at_the_same_nu(monkeypatch):
    x, (_, hot, y) = torch.rand(12, 3, 4, 4, generator=generator()), batch()
    peer = v2.MixUp(alpha=1.0, num_classes=4)
    monkeypatch.setattr(peer, "make_params", lambda _: {"lam": 0.3})
    FixedPartners(monkeypatch, torch.arange(12).roll(1))
    ours = mixup(x, hot.float(), generator=generator(), nu=0.3)
    for a, b in zip(ours, peer(x, y), strict=True):
        assert_close(a, b)


def test_timm_at_the_same_nu_with_smoothing(monkeypatch):
    x, (_, hot, y) = torch.rand(12, 3, 4, 4, generator=generator()), batch()
    peer = timm.data.mixup.Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=4)
    monkeypatch.setattr(peer, "_params_per_batch", lambda: (0.3, False))
    FixedPartners(monkeypatch, torch.arange(12).flip(0))
    mixed, targets = mixup(x, hot.float(), generator=generator(), nu=0.3)
    theirs, their_targets = peer(x.clone(), y)
    assert_close(mixed, theirs)
    assert_close(smooth(targets, 0.1), their_targets)


def test_share_follows_the_beta_law():
    for a in (0.2, 0.5, 2.0):
        nu = torch.tensor([mixup(torch.eye(2), torch.eye(2), a, generator=generator(s))[0].max() for s in range(800)])
        nu = nu[nu < 1]  # the others met themselves; of nu and 1 - nu this is the larger, E (nu - 1/2)^2 = Var
        variance = ((nu.double() - 0.5) ** 2).mean().item()
        assert variance == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.15), a


@pytest.mark.parametrize("nu", [0.0, 1.0])
def test_ends_of_the_mixture(nu):
    x, (_, hot, _) = torch.rand(12, 3, generator=generator()), batch()
    mixed, targets = mixup(x, hot, generator=generator(), nu=nu)
    assert torch.equal(mixed, x) == (nu == 1) and torch.equal(mixed.sort(0).values, x.sort(0).values)
    assert_close(targets.sum(0), hot.sum(0))


def test_a_batch_of_one_is_its_own_partner():
    model, (x, y) = net(), task(1)
    assert torch.equal(mixup(x, torch.eye(4)[y], generator=generator())[0], x)
    assert_close(
        bang_loss(model, x, y, 0.1, 0.5, generator=generator()),
        bang_loss(model, x, y, 0.1, None, generator=generator()),
    )


# --- the loss and the training ----------------------------------------------------------------------------------------
def test_loss_of_a_batch_by_hand():
    model, (x, y) = net(), task(12)
    mixed, targets = mixup(x, F.one_hot(y, 4).float(), 1.0, generator=generator(5))
    assert_close(
        bang_loss(model, x, y, 0.2, 1.0, generator=generator(5)), soft_cross_entropy(model(mixed), smooth(targets, 0.2))
    )
    g = generator()
    before = g.get_state()
    assert_close(bang_loss(model, x, y, 0.0, None, generator=g), F.cross_entropy(model(x), y))
    assert torch.equal(g.get_state(), before)


def test_plain_fine_tuning_is_the_usual_loop():
    model, (x, y) = net(), task(50)
    tuned = fine_tune(model, x, y, 0.0, None, epochs=2, lr=0.01, batch_size=16, weight_decay=0.1, seed=3)
    peer, order = copy.deepcopy(model), generator(3)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(8):
        if step % 4 == 0:
            batches = torch.randperm(50, generator=order).split(16)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + np.cos(np.pi * step / 8)) / 2
        optimizer.zero_grad()
        F.cross_entropy(peer(x[batches[step % 4]]), y[batches[step % 4]]).backward()
        optimizer.step()
    for a, b in zip(tuned.parameters(), peer.parameters(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_fine_tuning_leaves_model_and_random_numbers_alone():
    model, (x, y) = net().eval(), task(40)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tuned = fine_tune(model, x, y, epochs=1)
    assert not tuned.training and not model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    again = fine_tune(model, x, y, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))


def test_the_same_batches_whatever_the_targets(monkeypatch):
    model, (x, y) = net(), task(40)
    seen: dict[object, list[Tensor]] = {}

    def spy(model, x, y, smoothing, mixing, *, generator):
        seen.setdefault((mixing, generator.initial_seed()), []).append(x)
        return bang_loss(model, x, y, smoothing, mixing, generator=generator)

    monkeypatch.setattr("peftref.merging.bang.bang_loss", spy)
    for mixing, seed in ((None, 0), (0.5, 0), (0.5, 1)):
        fine_tune(model, x, y, mixing=mixing, batch_size=16, epochs=2, seed=seed)
    plain, mixed, other = seen.values()  # three keys: Mixup's own seed follows the seed given
    assert len(plain) == 6 and all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(mixed, other, strict=True))


def test_every_setting_of_fine_tuning_matters():
    model, (x, y) = net(), task(40)
    base = {"smoothing": 0.1, "mixing": 0.5, "epochs": 2, "lr": 0.01, "batch_size": 16, "weight_decay": 0.0, "seed": 0}
    changes = {
        "smoothing": 0.0,
        "mixing": None,
        "epochs": 3,
        "lr": 0.02,
        "batch_size": 8,
        "weight_decay": 0.5,
        "seed": 1,
    }
    usual = fine_tune(model, x, y, **base)[0].weight
    for name, value in changes.items():
        assert not torch.allclose(usual, fine_tune(model, x, y, **{**base, name: value})[0].weight, atol=1e-5), name


def test_smoothing_and_mixing_make_a_modest_model():
    """What BANG needs of them: the same data, less confidence, hardly less accuracy."""
    (x, y), sure = task(400), {}
    for name, strength in {
        "plain": (0.0, None),
        "smooth": (0.2, None),
        "mixup": (0.0, 1.0),
        "both": (0.2, 1.0),
    }.items():
        tuned = fine_tune(net(), x, y, *strength, epochs=10, lr=0.01, batch_size=50)
        with torch.no_grad():
            probs = tuned(x).softmax(-1)
        sure[name] = confidence(probs)
        assert (probs.argmax(-1) == y).double().mean() > 0.85
    assert sure["plain"] - 0.03 > max(sure["smooth"], sure["mixup"])
    assert min(sure["smooth"], sure["mixup"]) - 0.03 > sure["both"]


# --- WiSE-FT ----------------------------------------------------------------------------------------------------------
def test_average_of_linear_models_is_the_average_of_their_outputs():
    a, b, x = nn.Linear(6, 4).double(), nn.Linear(6, 4).double(), torch.randn(9, 6, dtype=torch.double)
    merged = nn.Linear(6, 4).double()
    merged.load_state_dict(merge(a.state_dict(), [b.state_dict()], wise_ft(0.3)))
    assert_close(merged(x), 0.7 * a(x) + 0.3 * b(x))


def test_average_commutes_with_a_permutation_of_both_parents():
    order = torch.randperm(16, generator=generator())

    def permuted(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**state, "0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order],
                "2.weight": state["2.weight"][:, order]}  # fmt: skip

    a, b = net(0).state_dict(), net(1).state_dict()
    first = permuted(merge(a, [b], wise_ft(0.4)))
    second = merge(permuted(a), [permuted(b)], wise_ft(0.4))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_equal_information_is_the_plain_average():
    a, b = net(0).state_dict(), net(1).state_dict()
    fisher = {n: torch.rand_like(t) for n, t in a.items()}
    plain, weighted = merge(a, [b], wise_ft(0.4)), merge(a, [b], fisher_wise_ft(0.4, fisher, fisher))
    for n in plain:
        assert_close(weighted[n], plain[n])


# --- outcomes ---------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(arrays.arrays(np.int64, st.tuples(st.just(4), st.integers(1, 30)), elements=st.integers(0, 2)))
def test_outcomes_are_the_loops(rows):
    table = outcomes(*torch.from_numpy(rows))
    assert table["count"].to_dict() == loop_outcomes(*rows.tolist())
    assert list(table.index) == ["FFF", "FFT", "FTF", "FTT", "TFF", "TFT", "TTF", "TTT"]
    np.testing.assert_allclose(table.fraction, table["count"] / rows.shape[1])
    for name, predicted in zip(("first", "second", "average"), rows[1:], strict=True):
        assert table.fraction[table[name]].sum() == pytest.approx(accuracy_score(rows[0], predicted))


def test_outcomes_of_two_models_are_a_confusion_matrix():
    y, a, b, c = torch.randint(3, (4, 500), generator=generator())
    table = outcomes(y, a, b, c)["count"].to_numpy().reshape(2, 2, 2)
    np.testing.assert_array_equal(table.sum(2), confusion_matrix(a == y, b == y))
    np.testing.assert_array_equal(table.sum(0), confusion_matrix(b == y, c == y))


# --- confidence and calibration ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_by_scikit_learn_and_the_loop(bins):
    logits, _, y = batch(2000, 5)
    probs = (2 * logits).softmax(-1)
    top, right = probs.amax(-1).numpy(), (probs.argmax(-1) == y).numpy()
    accuracy, sure = calibration_curve(right, top, n_bins=bins)
    weight, _ = np.histogram(np.ceil(top * bins), np.arange(0.5, bins + 1))
    expected = (weight[weight > 0] / len(y) * np.abs(accuracy - sure)).sum()
    assert calibration_error(probs, y, bins) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(probs, y, bins) == pytest.approx(loop_calibration_error(probs.tolist(), y.tolist(), bins))
    assert confidence(probs) == pytest.approx(top.mean())


def test_calibration_in_closed_form():
    y = torch.tensor([0, 0, 0, 1])
    three_of_four, sure = torch.tensor([[0.75, 0.25], [1.0, 0.0]])[:, None].repeat(1, 4, 1)
    assert calibration_error(three_of_four, y) == pytest.approx(0)
    assert calibration_error(sure, y) == pytest.approx(0.25)
    wrong = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    assert calibration_error(wrong, torch.tensor([1, 1])) == pytest.approx(0.8)
    mixed = torch.tensor([[1.0, 0.0], [0.6, 0.4]])  # too sure in one bin, too modest in the other: no cancelling
    assert calibration_error(mixed, torch.tensor([1, 0])) == pytest.approx((1.0 + 0.4) / 2)
    assert calibration_error(mixed, torch.tensor([1, 0]), bins=1) == pytest.approx(0.3)
    edge = torch.tensor([[0.75, 0.25], [0.625, 0.375]])  # (0.5, 0.75] holds both
    assert calibration_error(edge, torch.tensor([0, 1]), bins=4) == pytest.approx(abs(1 - 1.375) / 2)


# --- bad input --------------------------------------------------------------------------------------------------------
HOT, X, Y = torch.eye(4)[:3], torch.zeros(3, 2), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: smooth(HOT, 1.0), ValueError, r"smoothing: expected a number in \[0, 1\), got 1.0"),
        (lambda: smooth(HOT, -0.1), ValueError, "smoothing: expected"),
        (lambda: smooth(torch.ones(3, 1)), ValueError, "targets: expected shape"),
        (lambda: smooth(torch.tensor([0, 1])), TypeError, "targets: expected floating-point"),
        (lambda: mixup(X, HOT, 0.0, generator=generator()), ValueError, "mixing: expected a positive"),
        (lambda: mixup(X, HOT, float("nan"), generator=generator()), ValueError, "mixing: expected a positive"),
        (lambda: mixup(X, HOT, nu=1.5, generator=generator()), ValueError, "nu: expected"),
        (lambda: mixup(X[:2], HOT, generator=generator()), ValueError, r"targets: expected shape \(2, K\)"),
        (lambda: soft_cross_entropy(X, HOT), ValueError, "targets: expected shape"),
        (lambda: bang_loss(nn.Linear(2, 1), X, Y, generator=generator()), ValueError, "K >= 2"),
        (lambda: bang_loss(nn.Linear(2, 4), X, Y, 2.0, generator=generator()), ValueError, "smooth"),
        (lambda: fine_tune(nn.Linear(2, 4), X, torch.zeros(2).long()), ValueError, "x, y: expected equal"),
        (lambda: fine_tune(nn.Linear(2, 4), X, Y, epochs=0), ValueError, "epochs: expected"),
        (lambda: fine_tune(nn.Linear(2, 4), X, Y, mixing=-1.0), ValueError, "mixing: expected"),
        (lambda: outcomes(*torch.zeros(3, 2), torch.zeros(3)), ValueError, "y, average: expected one shape"),
        (lambda: outcomes(*torch.zeros(4, 0)), ValueError, "y, first: expected one shape"),
        (lambda: confidence(torch.randn(3, 4)), ValueError, "probs: expected rows that sum to 1"),
        (lambda: confidence(torch.tensor([[1.5, -0.5]])), ValueError, "probs: expected rows that sum to 1"),
        (lambda: confidence(torch.ones(3, 1)), ValueError, "probs: expected shape"),
        (lambda: calibration_error(HOT, torch.zeros(4)), ValueError, "y: expected shape"),
        (lambda: calibration_error(HOT, torch.zeros(3), bins=0), ValueError, "bins: expected an integer"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    """BatchNorm cannot learn from a single sample."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(21, 3, generator=g), torch.randint(2, (21,), generator=g)
    tuned = fine_tune(net, x, y, epochs=1, batch_size=10)
    assert int(tuned[1].num_batches_tracked) == 2
    assert int(fine_tune(net, x[:20], y[:20], epochs=1, batch_size=10)[1].num_batches_tracked) == 2


@pytest.mark.parametrize("y", [[0, 1, 7], [0, -1, 1], [0.0, 1.0, 1.0], [0, 1]])
def test_wrong_classes_are_refused(y: list) -> None:
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="^y: expected classes"):
        bang_loss(nn.Linear(3, 4), torch.randn(3, 3, generator=g), torch.tensor(y), generator=g)


def test_mixup_needs_floating_point_inputs() -> None:
    with pytest.raises(TypeError, match="^x: expected floating-point inputs, got torch.uint8"):
        mixup(torch.zeros(2, 3, dtype=torch.uint8), torch.eye(2), generator=torch.Generator())
