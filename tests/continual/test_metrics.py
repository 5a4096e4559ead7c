"""The numbers read off an accuracy matrix: by hand, by loops, and what must hold of any matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.continual.core import metrics
from peftref.continual.core.metrics import evaluate
from peftref.continual.core.streams import Task, class_incremental
from peftref.data import Split, load

NAN = math.nan
HAND = torch.tensor([[90.0, NAN, NAN], [70.0, 80.0, NAN], [60.0, 75.0, 85.0]])
ALL = ("last_accuracy", "average_incremental", "forgetting", "backward_transfer", "plasticity")


def matrices(smallest: int = 2) -> st.SearchStrategy[Tensor]:
    def filled(t: int) -> st.SearchStrategy[Tensor]:
        numbers = st.floats(0, 100, allow_subnormal=False)
        return st.lists(numbers, min_size=t * t, max_size=t * t).map(
            lambda v: torch.tensor(v, dtype=torch.double).reshape(t, t)
        )

    return st.integers(smallest, 5).flatmap(filled)


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


def test_by_hand():
    assert close(metrics.last_accuracy(HAND), 220 / 3)  # 73.33
    assert close(metrics.average_incremental(HAND), (90 + 75 + 220 / 3) / 3)  # 79.44
    assert close(metrics.forgetting(HAND), 17.5)  # ((90 - 60) + (80 - 75)) / 2
    assert close(metrics.backward_transfer(HAND), -17.5)
    assert close(metrics.plasticity(HAND), 85)
    assert metrics.average_accuracy(HAND).tolist() == pytest.approx([90, 75, 220 / 3])
    assert metrics.summary(HAND) == {
        "last": metrics.last_accuracy(HAND), "incremental": metrics.average_incremental(HAND), "forgetting": 17.5,
        "bwt": -17.5, "plasticity": 85.0,
    }  # fmt: skip


def test_the_two_maxima_of_forgetting():
    a = torch.tensor([[60.0, 0, 0], [80, 70, 0], [90, 65, 99]])  # the first task is best at the very end
    assert close(metrics.forgetting(a), (0 + 5) / 2)
    assert close(metrics.forgetting(a, with_last=False), (-10 + 5) / 2)


def test_the_best_row_may_be_between():
    a = torch.tensor([[60.0, 0, 0], [80, 70, 0], [50, 65, 99]])
    assert close(metrics.forgetting(a), (30 + 5) / 2)
    assert close(metrics.backward_transfer(a), (-10 - 5) / 2)  # from the diagonal, not from the best


def test_forward_transfer_by_hand():
    a = torch.tensor([[90.0, 20, 5], [70, 80, 30], [60, 75, 85]])
    assert close(metrics.forward_transfer(a, torch.tensor([10.0, 12, 8])), ((20 - 12) + (30 - 8)) / 2)
    assert metrics.forward_transfer(a, torch.tensor([99.0, 12, 8])) == 15  # the first task has no past


def test_weighted_by_images():
    counts = torch.tensor([100, 300, 50])
    expected = [90, (70 * 100 + 80 * 300) / 400, (60 * 100 + 75 * 300 + 85 * 50) / 450]
    assert metrics.average_accuracy(HAND, counts).tolist() == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(a=matrices())
def test_in_loops(a):
    t = len(a)
    last = sum(a[t - 1, i].item() for i in range(t)) / t
    incremental = sum(sum(a[s, i].item() for i in range(s + 1)) / (s + 1) for s in range(t)) / t
    lost = [max(a[s, i].item() for s in range(i, t)) - a[t - 1, i].item() for i in range(t - 1)]
    before = [max(a[s, i].item() for s in range(i, t - 1)) - a[t - 1, i].item() for i in range(t - 1)]
    back = [a[t - 1, i].item() - a[i, i].item() for i in range(t - 1)]
    assert close(metrics.last_accuracy(a), last)
    assert close(metrics.average_incremental(a), incremental)
    assert close(metrics.forgetting(a), sum(lost) / (t - 1))
    assert close(metrics.forgetting(a, with_last=False), sum(before) / (t - 1))
    assert close(metrics.backward_transfer(a), sum(back) / (t - 1))
    assert close(metrics.plasticity(a), sum(a[i, i].item() for i in range(t)) / t)


@settings(max_examples=50, deadline=None)
@given(a=matrices(), shift=st.floats(-50, 50))
def test_what_holds_of_any_matrix(a, shift):
    kept = a.clone()
    assert metrics.forgetting(a) >= 0
    assert metrics.forgetting(a) >= -metrics.backward_transfer(a) - 1e-9  # the best row is at least the diagonal
    assert metrics.forgetting(a) >= metrics.forgetting(a, with_last=False) - 1e-9
    # A_T = plasticity + (T - 1) / T BWT
    t = len(a)
    sum_ = metrics.plasticity(a) + (t - 1) / t * metrics.backward_transfer(a)
    assert close(metrics.last_accuracy(a), sum_)
    for name in ("forgetting", "backward_transfer"):  # differences: a common shift cancels
        assert abs(getattr(metrics, name)(a + shift) - getattr(metrics, name)(a)) < 1e-9
    for name in ("last_accuracy", "average_incremental", "plasticity"):
        assert abs(getattr(metrics, name)(a + shift) - getattr(metrics, name)(a) - shift) < 1e-9
    equal = metrics.average_accuracy(a, torch.full((t,), 7))
    torch.testing.assert_close(equal, metrics.average_accuracy(a))
    assert torch.equal(a, kept)


@settings(max_examples=20, deadline=None)
@given(a=matrices(1))
def test_above_the_diagonal_nothing_is_read(a):
    blank = a.clone()
    blank[torch.ones_like(a).triu(1).bool()] = NAN
    assert metrics.summary(blank) == metrics.summary(a)
    assert all(math.isfinite(value) for value in metrics.summary(blank).values())


def test_one_task_has_neither_forgetting_nor_transfer():
    assert metrics.summary(torch.tensor([[90.0]])) == {"last": 90, "incremental": 90, "plasticity": 90}
    for name in ("forgetting", "backward_transfer"):
        with pytest.raises(ValueError, match="a: expected two tasks or more"):
            getattr(metrics, name)(torch.tensor([[90.0]]))


@pytest.mark.parametrize("name", ALL)
def test_bad_matrices_are_refused(name):
    for bad in (torch.zeros(2, 3), torch.zeros(3), torch.zeros(0, 0)):
        with pytest.raises(ValueError, match="a: expected a square matrix"):
            getattr(metrics, name)(bad)
    hole = HAND.clone()
    hole[2, 0] = NAN
    with pytest.raises(ValueError, match="a: expected an accuracy for every task learned so far, got NaN"):
        getattr(metrics, name)(hole)


def test_numbers_of_tasks_must_fit():
    for counts in (torch.ones(1), torch.ones(2), torch.ones(3, 1)):  # of length 1 it would broadcast to wrong numbers
        with pytest.raises(ValueError, match="counts: expected a number for each of 3 tasks"):
            metrics.average_accuracy(HAND, counts)
    with pytest.raises(ValueError, match="counts: expected positive"):
        metrics.average_accuracy(HAND, torch.tensor([1, 0, 1]))
    full = HAND.nan_to_num(0)
    with pytest.raises(ValueError, match="untrained: expected a number for each"):
        metrics.forward_transfer(full, torch.zeros(2))
    with pytest.raises(ValueError, match="NaN above the diagonal"):
        metrics.forward_transfer(HAND, torch.zeros(3))


# --- evaluate ---------------------------------------------------------------------------------------------------------
TASKS = class_incremental(load("digits"), [4, 3, 3])


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).eval()


def test_accuracy_counted_one_by_one():
    model = net()
    expected = []
    for task in TASKS:
        right = [int(model(x[None]).argmax() == y) for x, y in zip(*task.test, strict=True)]
        expected.append(100 * sum(right) / len(right))
    row = evaluate(model, TASKS)
    assert row.dtype == torch.float64
    assert row.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_own_classes_only():
    """All logits of a later task are larger: alone, an earlier task's classes are told apart as well as before."""
    model = net()
    with torch.no_grad():
        model[2].bias[4:] += 100
    assert evaluate(model, TASKS)[0] == 0
    alone = evaluate(model, TASKS, own_classes=True)
    expected = [
        100 * (model(t.test.x)[:, t.classes].argmax(-1) + t.classes.start == t.test.y).double().mean() for t in TASKS
    ]
    assert alone.tolist() == pytest.approx([e.item() for e in expected])
    assert alone[0] > 0 and (alone >= evaluate(model, TASKS)).all()


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_batches_do_not_matter_and_nothing_changes(size):
    model = net()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(evaluate(model, TASKS, batch_size=size), evaluate(model, TASKS))
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert not model.training


def test_any_function_can_predict():
    perfect = {len(task.test.y): nn.functional.one_hot(task.test.y, 10).float() for task in TASKS}
    assert evaluate(lambda x: perfect[len(x)], TASKS).tolist() == [100] * 3


def test_no_graph_is_kept():
    seen = []

    def predict(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return net()(x)

    evaluate(predict, TASKS)
    assert not any(seen)


def test_a_label_for_each_pixel():
    """As of the pixels one by one, over the classes: the axis after the images, not the last."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 4, 3, 2, generator=g), torch.randint(4, (5, 3, 2), generator=g)
    flat = x.movedim(1, -1).flatten(0, -2)
    tasks, rows = ([Task(("a",), range(1, 3), *[Split(a, b)] * 3)] for a, b in ((x, y), (flat, y.flatten())))
    for own in (False, True):
        found = evaluate(lambda x: x, tasks, own_classes=own)
        assert_close(found, evaluate(lambda x: x, rows, own_classes=own))
    with pytest.raises(
        ValueError, match=r"predict: expected logits \(N, K\) for labels \(N,\), got \(5, 4, 3, 2\) for"
    ):
        evaluate(lambda x: x, [tasks[0]._replace(test=Split(x, y[:, 0, 0]))])
    with pytest.raises(TypeError, match=r"model: expected logits \(N, K\) as a tensor, got tuple"):
        evaluate(lambda x: (x, None), tasks)
