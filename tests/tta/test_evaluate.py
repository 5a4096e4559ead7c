"""The online protocol on streams small enough to check by eye, with a method that answers what it was told to."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peftref.data.streams import Stream
from peftref.tta.baselines.tent import Tent
from peftref.tta.cotta import CoTTA
from peftref.tta.experiments.evaluate import (
    Run,
    drift,
    error_by_domain,
    mean_error,
    mean_recall,
    run,
    run_seeds,
    running_error,
    summary,
)

# Three segments (6, 2 and 4 images) of two domains, in batches of 3, the last of 4; a 1 marks a wrong answer to come.
DOMAIN = [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
SEGMENT = [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
WRONG = [1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1]
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 1, 2]


def stream(domain=DOMAIN, segment=SEGMENT, batch_size: int = 3) -> Stream:
    """The image is the answer: its single pixel holds the class that the method will say."""
    y = torch.tensor(LABELS)
    x = ((y + torch.tensor(WRONG)) % 3).float().view(-1, 1, 1, 1)
    severity = torch.tensor([5 if d == 0 else 0 for d in domain])
    return Stream(x, y, torch.tensor(domain), severity, torch.tensor(segment), ("fog", "clean"), batch_size)


class Says(nn.Module):
    """Answers the class in the pixel; keeps a diary."""

    def __init__(self) -> None:
        super().__init__()
        self.diary: list[object] = []

    def reset(self) -> None:
        self.diary.append("reset")

    def forward(self, x: Tensor) -> Tensor:
        self.diary.append(len(x))
        assert not self.training and not torch.is_grad_enabled()
        return nn.functional.one_hot(x.flatten().long(), 3).float()


def result() -> Run:
    return run(Says(), stream())


def test_rows_by_hand():
    rows = result().batches
    assert rows.segment.tolist() == [0, 0, 1, 2]  # no batch crosses a segment
    assert rows.domain.tolist() == ["fog", "fog", "clean", "fog"]
    assert rows.severity.tolist() == [5, 5, 0, 5]
    assert rows.n.tolist() == [3, 3, 2, 4]
    assert rows.wrong.tolist() == [1, 0, 2, 2]
    assert (rows.seconds > 0).all()


def test_predictions_are_in_stream_order():
    r = result()
    assert r.predictions.tolist() == [(y + w) % 3 for y, w in zip(LABELS, WRONG, strict=True)]
    assert r.labels.tolist() == LABELS
    assert r.domains.tolist() == [("fog", "clean")[d] for d in DOMAIN]


@pytest.mark.parametrize(
    ("reset", "diary"),
    [
        ("first", ["reset", 3, 3, 2, 4]),
        ("segment", ["reset", 3, 3, "reset", 2, "reset", 4]),
    ],
)
def test_resets(reset, diary):
    method = Says()
    run(method, stream(), reset=reset)
    assert method.diary == diary


def test_every_run_starts_from_the_source():
    """Adaptation on the first stream leaves no trace in the second run; without ``reset`` between segments it does."""
    data = stream(batch_size=2)
    data.x.copy_(torch.rand(data.x.shape, generator=torch.Generator().manual_seed(0)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    method = Tent(net, lr=0.5)

    def drifts(reset: str = "first") -> list[float]:
        return run(method, data, reset=reset, observe=lambda m: drift(m, "model")).batches.drift.tolist()

    first = drifts()
    assert drifts() == first and min(first) > 0
    again = drifts("segment")
    assert again[:3] == first[:3] and again[3] < first[3]  # batches 0, 1, 2 are the first segment


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_seeds_in_parallel_are_the_single_runs(n_jobs):
    def net(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    data = stream(batch_size=2)
    noisy = replace(data, x=data.x + torch.rand(data.x.shape, generator=torch.Generator().manual_seed(0)))
    methods = {"slow": functools.partial(Tent, lr=0.01), "fast": functools.partial(Tent, lr=0.5)}
    threads = torch.get_num_threads()
    runs = run_seeds(methods, [net(0), net(1)], [data, noisy], n_jobs=n_jobs, reset="segment")
    assert torch.get_num_threads() == threads
    assert list(runs) == ["slow", "fast"] and [len(r) for r in runs.values()] == [2, 2]
    for name, wrap in methods.items():
        for seed, (r, s) in enumerate(zip(runs[name], (data, noisy), strict=True)):
            single = run(wrap(net(seed)), s, reset="segment")
            assert torch.equal(r.predictions, single.predictions) and torch.equal(r.labels, single.labels)
            assert r.batches.drop(columns="seconds").equals(single.batches.drop(columns="seconds"))
    with pytest.raises(ValueError):
        run_seeds(methods, [net(0)], [data, noisy], n_jobs=1)


def test_labels_never_reach_the_method():
    data = stream()
    a, b = Says(), Says()
    first, second = run(a, data), run(b, replace(data, y=data.y.flip(0)))
    assert torch.equal(first.predictions, second.predictions) and a.diary == b.diary


def test_a_plain_classifier_runs_in_eval_mode():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.Dropout(0.9), nn.BatchNorm1d(3)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    r = run(net, stream())
    assert torch.equal(r.predictions, net.eval()(stream().x).argmax(-1))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_errors_by_hand():
    r = result()
    per_domain = error_by_domain(r)
    assert per_domain.index.tolist() == ["fog", "clean"] and per_domain.name == "error"
    assert per_domain["fog"] == pytest.approx(100 * 3 / 10) and per_domain["clean"] == 100
    # plain mean over the three visits: 1/6, 2/2, 2/4; weighted by images it would be 5/12
    assert mean_error(r) == pytest.approx(100 * (1 / 6 + 1 + 1 / 2) / 3)


def test_domains_mixed_within_a_batch():
    """Each image counts for its own domain, not for that of the first of its batch."""
    mixed = stream(domain=[1, 0] * 6, segment=[0] * 12, batch_size=4)
    r = run(Says(), mixed)
    expected = {"clean": 100 * sum(WRONG[0::2]) / 6, "fog": 100 * sum(WRONG[1::2]) / 6}
    assert error_by_domain(r).to_dict() == pytest.approx(expected)
    assert error_by_domain(r).index.tolist() == ["clean", "fog"]  # order of first appearance
    assert mean_error(r) == pytest.approx(100 * sum(WRONG) / 12)  # one segment


def test_running_error_by_hand():
    np.testing.assert_allclose(running_error(result(), 2), [100 / 3, 100 / 6, 100 * 2 / 5, 100 * 4 / 6])
    np.testing.assert_allclose(running_error(result(), 1), result().batches.eval("100 * wrong / n"))
    assert running_error(result())[-1] == pytest.approx(100 * 5 / 12)


def test_mean_recall_by_hand():
    """Right answers over images, per class; a class that never occurs does not count."""
    r = result()
    right = [sum(y == c and not w for y, w in zip(LABELS, WRONG, strict=True)) for c in range(3)]
    expected = 100 * np.mean([right[c] / LABELS.count(c) for c in range(3)])
    assert mean_recall(r, 3) == pytest.approx(expected) == mean_recall(r, 10)
    assert mean_recall(r, 3) != pytest.approx(100 * 7 / 12)  # not the accuracy
    # saying one class always is 1 / K, however frequent it is
    lazy = r._replace(predictions=torch.zeros(12, dtype=torch.long))
    assert mean_recall(lazy, 3) == pytest.approx(100 / 3)


def test_observe_adds_columns():
    r = run(Says(), stream(), observe=lambda m: {"batches": float(sum(isinstance(e, int) for e in m.diary))})
    assert r.batches.batches.tolist() == [1, 2, 3, 4]


def test_drift_is_the_distance_of_all_parameters():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    method = CoTTA(net)
    assert drift(method) == {"drift": 0.0}
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(0.5)
        method.teacher[0].bias += 2.0
    count = sum(p.numel() for p in net.parameters())
    assert drift(method)["drift"] == pytest.approx(0.5 * math.sqrt(count))
    assert drift(method, "teacher")["drift"] == pytest.approx(2.0 * math.sqrt(4))


def test_summary_over_seeds():
    r = result()
    worse = r._replace(batches=r.batches.assign(wrong=r.batches.n))
    table = summary({"a": [r, worse], "b": [r, r]})
    e = mean_error(r)
    assert table.loc["a"].tolist() == pytest.approx([(e + 100) / 2, (100 - e) / math.sqrt(2)])
    assert table.loc["b"].tolist() == pytest.approx([e, 0.0])
    assert summary({"a": [r]}, lambda r: mean_recall(r, 3)).loc["a", "mean"] == pytest.approx(mean_recall(r, 3))


def test_unknown_reset_is_refused_before_anything_runs():
    method = Says()
    with pytest.raises(ValueError, match="reset: expected 'first' or 'segment', got 'never'"):
        run(method, stream(), reset="never")
    assert method.diary == []


def test_a_batch_too_small_for_the_method_is_refused_before_anything_runs():
    """A segment of one image has no batch to join: all results before it would be lost."""
    data = stream(segment=[0] * 11 + [1])
    method = Says()
    method.smallest = 2
    with pytest.raises(ValueError, match="stream: expected batches of at least 2 samples.* got one of 1"):
        run(method, data)
    assert method.diary == []
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    for method in (Tent(net), CoTTA(net, n_views=0)):
        with pytest.raises(ValueError, match="stream: expected batches of at least 2"):
            run(method, data)
        assert len(run(method, stream()).predictions) == 12


def test_other_than_logits_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    net.register_forward_hook(lambda *_: (torch.zeros(3, 3), None))
    with pytest.raises(TypeError, match=r"method: expected logits \(N, K\), got tuple"):
        run(net, stream())
