r"""CLASSP's experiment, one network at a time: what it learned of the digits, and what a method makes of it on clothes.

>>> study = Study([0], digits_per_class=8, clothes_per_class=8, test=50, width=2)
>>> len(study.both("SGD", 0.1, 0)), study.tau(0.25) < study.tau(0.1)
(2, True)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Dataset, Split, load
from ...fitting import batches
from ..baselines.ewc import EWC
from ..classp import CLASSP, gate
from ..core.rule import FineTune
from ..core.streams import Task, class_incremental
from .classp_at_scale import PaperCNN

__all__ = ["Study"]

GATES = (0.25, 0.1)  # shares of the first batch's squared gradients that pass


class Study:
    """The data, and the networks that have learned the digits, each made once."""

    def __init__(
        self,
        seeds: Sequence[int],
        digits_per_class: int | None,
        clothes_per_class: int | None,
        test: int | None,
        width: int,
    ) -> None:
        self.seeds = seeds
        self.width = width
        self.digits = small(load("mnist5k"), digits_per_class, test)
        self.clothes = small(load("fashion8k"), clothes_per_class, test)
        self.firsts: dict[tuple[int, float], tuple[nn.Module, list[Tensor]]] = {}
        self.springs: dict[int, EWC] = {}
        self.taus: dict[float, float] = {}

    def first(self, seed: int, power: float = 1) -> tuple[nn.Module, list[Tensor]]:
        """A network that SGD has taught the digits, and what CLASSP remembers of it."""
        if (seed, power) not in self.firsts:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                net = PaperCNN(width=self.width, side=14, mean=0.0, std=1.0)
            optimizer = CLASSP(net.parameters(), lr=0.3, threshold=0.0, power=power, apply_decay=False)
            learn(net, optimizer, self.digits, seed, epochs=2, fade=False)
            self.firsts[seed, power] = net, [optimizer.state[p]["sum"] for p in net.parameters()]
        return self.firsts[seed, power]

    def spring(self, seed: int) -> EWC:
        """EWC's stiffness after the digits."""
        if seed not in self.springs:
            rule = EWC(1.0)
            rule.end_task(self.first(seed)[0], *self.digits.train)
            self.springs[seed] = rule
        return self.springs[seed]

    def tau(self, share: float) -> float:
        """The threshold that this share of the squared gradients of the first batch of clothes is above, on average."""
        if share not in self.taus:
            squares = [torch.cat(self.gradients(seed)).square() for seed in self.seeds]
            self.taus[share] = float(sum(float(t.quantile(1 - share)) for t in squares) / len(squares))
        return self.taus[share]

    def gradients(self, seed: int) -> list[Tensor]:
        """Of the first batch of clothes, by tensor."""
        net = copy.deepcopy(self.first(seed)[0])
        F.cross_entropy(net(self.clothes.train.x[:32]), self.clothes.train.y[:32]).backward()
        return [p.grad.flatten() for p in net.parameters() if p.grad is not None]

    def classp(self, net: nn.Module, lr: float, seed: int, memory: str = "kept", **options: Any) -> CLASSP:
        """The optimiser with the memory of the first task, as it was left or spoilt."""
        optimizer = CLASSP(net.parameters(), lr=lr, **options)
        sums = spoilt(self.first(seed, options.get("power", 1))[1], memory, seed)
        for p, s in zip(net.parameters(), sums, strict=True):
            optimizer.state[p]["sum"] = s.clone()
        return optimizer

    def method(self, name: str, net: nn.Module, lr: float, seed: int) -> tuple[torch.optim.Optimizer, FineTune]:
        """Optimiser and rule of the second task."""
        plain: dict[str, Any] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
        if name in plain:
            return plain[name](net.parameters(), lr=lr), FineTune()
        if name.startswith("EWC"):
            rule = EWC(float(name.split()[1]))
            rule.fisher = self.spring(seed).fisher
            rule.anchor = self.spring(seed).anchor
            return torch.optim.SGD(net.parameters(), lr=lr), rule
        options: dict[str, Any] = {"power": 2 if "p=2" in name else 1}
        for share, label in zip(GATES, ("1/4", "1/10"), strict=True):
            if name.endswith(label):
                options["threshold"] = self.tau(share)
        if name == "official p=2":  # whose memory sums |g|, as that of p = 1 does
            optimizer = self.classp(net, lr, seed)
            optimizer.param_groups[0].update(power=2.0, mode="official")
            return optimizer, FineTune()
        if name.startswith("gate only"):
            options["apply_decay"] = False
        memory = name.partition(", ")[2] if name.startswith("p=1") else "kept"
        return self.classp(net, lr, seed, memory, **options), FineTune()

    def both(self, name: str, lr: float, seed: int) -> list[list[float]]:
        """Accuracy on digits and on clothes after both, on validation and on test images."""
        net = copy.deepcopy(self.first(seed)[0])
        optimizer, rule = self.method(name, net, lr, seed)
        learn(net, optimizer, self.clothes, seed, rule)
        return [self.accuracy(net, part) for part in ("val", "test")]

    @torch.no_grad()
    def accuracy(self, net: nn.Module, part: str) -> list[float]:
        """On digits and on clothes, in %."""
        splits = [getattr(task, part) for task in (self.digits, self.clothes)]
        return [100 * (net(s.x).argmax(-1) == s.y).double().mean().item() for s in splits]

    def sums(self, seed: int) -> dict[str, Any]:
        """Distribution of log10 of s in each layer, in % of its weights, and the medians of s."""
        weights = [self.first(seed)[1][i].flatten() for i in (0, 2, 4, 6)]
        shares = [100 * torch.histc(t.clamp(1e-4, 99).log10(), 24, -4, 2) / t.numel() for t in weights]
        return {"shares": shares, "medians": [t.median() for t in weights]}

    def like_stiffness(self, seed: int) -> list[float]:
        """Of s with EWC's stiffness: rank correlation for p = 1, ratio of the means for p = 2."""
        one, two = (torch.cat([t.flatten() for t in self.first(seed, power)[1]]) for power in (1, 2))
        stiffness = torch.cat([f.flatten() for f in self.spring(seed).fisher.values()])
        ranks = torch.stack([t.argsort().argsort().double() for t in (one, stiffness)])
        steps = 2 * len(self.digits.train.y) / 32
        return [torch.corrcoef(ranks)[0, 1].item(), (stiffness.mean() / (two.mean() / steps)).item()]

    def activity(self, seed: int, tau: float) -> dict[str, Any]:
        """Share of the weights that move in each step on clothes, and at least once, in %."""
        net = copy.deepcopy(self.first(seed)[0])
        optimizer = self.classp(net, 0.2, seed, threshold=tau)
        before = [optimizer.state[p]["sum"].clone() for p in net.parameters()]
        seen: list[float] = []
        learn(net, optimizer, self.clothes, seed, each=lambda: seen.append(100 * optimizer.active_fraction()))
        after = [optimizer.state[p]["sum"] for p in net.parameters()]
        ever = torch.cat([(a != b).flatten() for a, b in zip(after, before, strict=True)])
        return {"share": seen, "ever": 100 * ever.float().mean()}

    def moved(self, seed: int, tau: float) -> list[float]:
        """Share of weights that the first batch moves; by eq-classp-share with one sigma, with one for each tensor."""
        g = self.gradients(seed)
        every = torch.cat(g)
        by_tensor = [_share(tau, t) * len(t) for t in g]
        shares = ((gate(every, tau) != 0).float().mean(), _share(tau, every), sum(by_tensor) / len(every))
        return [100 * float(v) for v in shares]


def _share(tau: float, g: Tensor) -> Tensor:
    # eq-classp-share:  P(g^2 > tau) = 2 Phi(-sqrt(tau) / sigma)
    share: Tensor = 2 * torch.special.ndtr(-(tau**0.5) / g.square().mean().sqrt())
    return share


def spoilt(sums: list[Tensor], memory: str, seed: int) -> list[Tensor]:
    """The sums of the first task as they were kept, or erased, shuffled within a tensor, or averaged over it."""
    generator = torch.Generator().manual_seed(seed)
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "kept": lambda t: t,
        "erased": torch.zeros_like,
        "shuffled": lambda t: t.flatten()[torch.randperm(t.numel(), generator=generator)].view_as(t),
        "averaged": lambda t: torch.full_like(t, float(t.mean())),
    }
    return [change[memory](t) for t in sums]


def small(data: Dataset, per_class: int | None, test: int | None) -> Task:
    """A data set as one task with all its classes at 14 x 14 pixels, a fifth of the training images held out."""
    task = class_incremental(data, 1, val=0.2, per_class=per_class)[0]
    return task._replace(train=_halved(task.train, None), val=_halved(task.val, test), test=_halved(task.test, test))


def _halved(split: Split, first: int | None) -> Split:
    return Split(F.avg_pool2d(split.x[:first], 2), split.y[:first])


def learn(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    seed: int,
    rule: FineTune | None = None,
    epochs: int = 1,
    fade: bool = True,
    each: Callable[[], object] = lambda: None,
) -> nn.Module:
    """Train on one task, with dropout; the step size falls linearly to zero if ``fade``. Left in eval mode."""
    rule = rule or FineTune()
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(task.train.y) // 32)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0 if fade else 1.0, total_iters=steps)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout
        net.train()
        for x, y in batches(task.train, 32, epochs=epochs, generator=generator):
            optimizer.zero_grad()
            rule.loss(net, x, y).backward()
            each()
            optimizer.step()
            rate.step()
    return net.eval()
