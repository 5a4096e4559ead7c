"""The common ground beside Avalanche 0.6: where the two agree to the last digit, and where they differ by design."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from peftref.continual.baselines.ewc import EWC, diagonal_fisher
from peftref.continual.baselines.rehearsal import derpp_loss, er_ace_loss
from peftref.continual.core import metrics
from peftref.continual.core.replay import Reservoir
from peftref.continual.core.streams import class_incremental
from peftref.continual.core.train import learn
from peftref.data import load
from peftref.models import SmallCNN

pytest.importorskip("avalanche", reason="optional, heavy: pip install peftref[peers]")

from avalanche.benchmarks.utils import as_classification_dataset  # noqa: E402
from avalanche.evaluation.metrics import BWT, Forgetting, ForwardTransfer  # noqa: E402
from avalanche.training.plugins import EWCPlugin  # noqa: E402
from avalanche.training.regularization import ACECriterion  # noqa: E402
from avalanche.training.storage_policy import ReservoirSamplingBuffer  # noqa: E402
from avalanche.training.supervised import DER  # noqa: E402

HAND = torch.tensor([[90.0, 20, 5], [70, 80, 30], [60, 75, 85]])


def labelled(x: Tensor, y: Tensor):
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    return as_classification_dataset(data)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallCNN(width=2, num_classes=4)
        model(torch.randn(40, 1, 12, 12))
        return model.double()


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 12, 12, dtype=torch.double, generator=g), torch.randint(4, (n,), generator=g)


# --- metrics ----------------------------------------------------------------------------------------------------------
def test_forgetting_and_backward_transfer():
    """Avalanche's forgetting starts from the diagonal, so it is our -BWT; ours starts from the best row."""
    ours, lost, back = [], Forgetting(), BWT()
    for metric in (lost, back):
        for i in range(3):
            metric.update(i, HAND[i, i].item(), initial=True)
            metric.update(i, HAND[2, i].item())
    ours = metrics.backward_transfer(HAND)
    mean = [sum(m.result()[i] for i in range(2)) / 2 for m in (lost, back)]  # the last task is left out
    assert mean == pytest.approx([-ours, ours])
    assert metrics.forgetting(HAND) == pytest.approx(mean[0])  # here each task was best when it was new
    later = HAND.clone()
    later[1, 0] = 95
    assert metrics.forgetting(later) > mean[0] and metrics.backward_transfer(later) == ours


def test_forward_transfer():
    untrained, metric = torch.tensor([10.0, 12, 8]), ForwardTransfer()
    for i in range(1, 3):
        metric.update(i, untrained[i].item(), initial=True)
        metric.update(i, HAND[i - 1, i].item())
    mean = sum(metric.result().values()) / 2
    assert metrics.forward_transfer(HAND, untrained) == pytest.approx(mean)


# --- reservoir --------------------------------------------------------------------------------------------------------
def test_reservoirs_hold_equally_many_of_every_place():
    """Theirs keeps the M largest of n random weights, ours is algorithm R: both hold each sample with chance M / n."""
    size, n, seeds = 8, 40, 300
    counts = {"theirs": torch.zeros(n), "ours": torch.zeros(n)}
    data = labelled(torch.arange(n).float(), torch.arange(n))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for seed in range(seeds):
            theirs, ours = ReservoirSamplingBuffer(size), Reservoir(size, seed)
            for part in torch.arange(n).split(20):
                theirs.update_from_dataset(data.subset(part.tolist()))
                ours.add(part)
            counts["theirs"][torch.tensor([int(y) for _, y, *_ in theirs.buffer])] += 1
            counts["ours"][ours.rows[0]] += 1
    for name, count in counts.items():
        statistic = ((count - seeds * size / n) ** 2).sum() / (seeds * size / n * (1 - size / n)) * (n - 1) / n
        assert 1e-3 < stats.chi2.sf(statistic.item(), n - 1) < 1 - 1e-3, name


# --- losses -----------------------------------------------------------------------------------------------------------
def test_er_ace_criterion():
    """Theirs is the mean of the two terms, ours their sum; theirs never lets classes to come compete."""
    g = torch.Generator().manual_seed(0)
    new, old = (torch.randn(n, 6, dtype=torch.double, generator=g) for n in (5, 3))
    y, y_old = torch.tensor([2, 3, 3, 2, 2]), torch.tensor([0, 1, 2])
    theirs = ACECriterion()(new, y, old, y_old)
    assert_close(2 * theirs, er_ace_loss(new, y, 6, old, y_old))  # all six seen: the same classes compete
    assert er_ace_loss(new, y, 4, old, y_old) > 2 * theirs + 1e-3


def test_der_step():
    """One step of their DER++ on a batch and one draw (theirs: one draw for both terms) is one step on our loss."""
    (x, y), (x1, y1) = batch(5), batch(4, 1)
    z1 = torch.randn(4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    ours, theirs = net().train(), net().train()
    strategy = DER(
        model=theirs, optimizer=torch.optim.SGD(theirs.parameters(), 0.1), batch_size_mem=4, alpha=0.3, beta=0.7,
        train_mb_size=5, evaluator=None,
    )  # fmt: skip
    strategy.replay_loader = iter([(x1, y1, torch.zeros(4).long(), z1)])
    strategy.dataloader = [[x, y, torch.zeros(5).long()]]
    strategy.experience = None
    strategy.training_epoch()
    out = ours(torch.cat((x1, x)))
    loss = derpp_loss(out[4:], y, out[:4], z1, out[:4], y1, 0.3, 0.7)
    assert_close(strategy.loss.squeeze(), loss.float(), rtol=1e-6, atol=1e-6)  # theirs starts in float32
    loss.backward()
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(q, p - 0.1 * p.grad)


# --- EWC --------------------------------------------------------------------------------------------------------------
def theirs_fisher(plugin: EWCPlugin, model: nn.Module, x: Tensor, y: Tensor, size: int) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = plugin.compute_importances(model, F.cross_entropy, optimizer, labelled(x, y), "cpu", size)
    return {name: importance.data for name, importance in found.items()}


def test_ewc_importances_agree_for_batches_of_one():
    model, (x, y) = net(), batch(8)
    ours, theirs = diagonal_fisher(model, x, y), theirs_fisher(EWCPlugin(1.0), model, x, y, 1)
    assert ours.keys() == theirs.keys()
    for name, f in ours.items():
        assert_close(theirs[name], f.float(), rtol=1e-5, atol=1e-9)  # theirs sums in float32


def test_ewc_importances_shrink_with_the_batch():
    """Theirs squares the gradient of a batch: its size acts like a smaller strength, by 1 / B where gradients average
    out (labels drawn from the network itself), and their plugin leaves out the 1/2."""
    model, (x, _) = net(), batch(400)
    p = model.eval()(x).detach().softmax(-1)
    y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    ours = diagonal_fisher(model, x, y)["fc.weight"]
    theirs = theirs_fisher(EWCPlugin(1.0), model, x, y, 20)["fc.weight"]
    assert 10 < (ours.sum() / theirs.sum()).item() < 40  # 20 batches: a fifth or two of noise


@pytest.mark.parametrize("decay", [1.0, 0.4])
def test_ewc_penalty_over_three_tasks(decay):
    """Same importances, same anchors: their online mode with lambda / 2 is ours."""
    model, rule = net(), EWC(6.0, decay=decay)
    plugin = EWCPlugin(3.0, mode="online", decay_factor=decay)
    for task in range(3):
        x, y = batch(8, task)
        rule.end_task(model, x, y)
        strategy = types.SimpleNamespace(
            model=model, _criterion=F.cross_entropy, optimizer=torch.optim.SGD(model.parameters(), 0.1), device="cpu",
            experience=types.SimpleNamespace(dataset=labelled(x, y)), train_mb_size=1, loss=torch.zeros(()).double(),
            clock=types.SimpleNamespace(train_exp_counter=task),
        )  # fmt: skip
        plugin.after_training_exp(strategy)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.05 * (i + 1))
        strategy.clock.train_exp_counter += 1
        plugin.before_backward(strategy)
        assert strategy.loss > 0.01
        # their sum starts in float32
        assert_close(rule.penalty(model), strategy.loss, rtol=1e-5, atol=0)


def test_ewc_separate_penalties_are_another_rule_from_the_second_task_on():
    """Their default keeps an anchor for each task; ours the last one. After one task the two are the same."""
    tasks = class_incremental(load("digits"), [4, 3, 3], per_class=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rule, plugin, penalties = EWC(2.0), EWCPlugin(1.0), []
    for t, task in enumerate(tasks[:2]):
        learn(model, [task], rule, lr=0.1)  # measures at its end
        dataset = types.SimpleNamespace(dataset=labelled(*task.train))
        strategy = types.SimpleNamespace(
            model=model, _criterion=F.cross_entropy, optimizer=torch.optim.SGD(model.parameters(), 0.1), device="cpu",
            experience=dataset, train_mb_size=1, clock=types.SimpleNamespace(train_exp_counter=t), loss=torch.zeros(()),
        )  # fmt: skip
        plugin.after_training_exp(strategy)
        with torch.no_grad():
            model[1].weight += 0.1
        strategy.clock.train_exp_counter += 1
        plugin.before_backward(strategy)
        penalties.append((rule.penalty(model).item(), strategy.loss.item()))
    assert penalties[0][0] == pytest.approx(penalties[0][1], rel=1e-4)
    assert penalties[1][0] != pytest.approx(penalties[1][1], rel=0.05)
