"""The arms of CoTTA's experiment: each method with the settings it is tried with, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..baselines.bn_adapt import BNAdapt
from ..baselines.tent import Tent
from ..core.adapted import freeze
from ..core.views import RandomViews
from ..cotta import CoTTA

__all__ = ["ARMS", "Arm", "Setting", "ViewedTent", "WholeTent"]

ALWAYS = 2.0  # a threshold that no confidence reaches


class Setting(NamedTuple):
    """What is tried: learning rate, and memory of the teacher."""

    lr: float = 0.0
    m: float = 0.0


class Arm(NamedTuple):
    """A method with a grid of settings, the published one first, or the only one.

    Attributes:
        wrap: makes the method of a network, a setting, and a number of views.
        grid: what is tried on the validation stream.
    """

    wrap: Callable[[nn.Module, Setting, int], nn.Module]
    grid: tuple[Setting, ...] = (Setting(),)


class WholeTent(Tent):
    """Tent over all parameters."""

    def reset(self) -> None:
        super().reset()
        every = list(self.model.parameters())
        freeze(every, trainable=every)
        self.optimizer = self.optimizer_factory(every, lr=self.lr)


class ViewedTent(Tent):
    """Tent that answers by the mean over views; what it learns from is the batch as it is."""

    def __init__(self, model: nn.Module, lr: float, n_views: int) -> None:
        super().__init__(model, lr)
        self.n_views = n_views
        self.views = RandomViews()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            answers = torch.stack([self.logits(self.model, self.views(x)) for _ in range(self.n_views)])
        super().forward(x)
        return answers.mean(0)


def _cotta(r: float = 0.01, symmetric: bool = False, views: bool = True) -> Callable[[nn.Module, Setting, int], CoTTA]:
    def wrap(net: nn.Module, setting: Setting, n_views: int) -> CoTTA:
        seen = n_views if views else 0
        return CoTTA(net, setting.lr, setting.m, r, ALWAYS, seen, symmetric=symmetric)

    return wrap


def _settings(*pairs: tuple[float, float]) -> tuple[Setting, ...]:
    return tuple(Setting(lr, m) for lr, m in pairs)


def _rates(*rates: float) -> tuple[Setting, ...]:
    return tuple(Setting(lr) for lr in rates)


PLAIN = _settings((1e-3, 0.999), (3e-3, 0.99), (1e-2, 0.99), (3e-2, 0.99))
SYMMETRIC = _settings((1e-3, 0.999), (1e-2, 0.99), (1e-3, 0.9), (3e-3, 0.9))

ARMS: dict[str, Arm] = {
    "source": Arm(lambda net, setting, n_views: net),
    "BN-adapt": Arm(lambda net, setting, n_views: BNAdapt(net)),
    "Tent": Arm(lambda net, setting, n_views: Tent(net, setting.lr), _rates(1e-3, 3e-3, 1e-2, 3e-2)),
    "all-parameter Tent": Arm(lambda net, setting, n_views: WholeTent(net, setting.lr), _rates(1e-3, 3e-4, 1e-4, 3e-5)),
    "views alone": Arm(_cotta()),
    "CoTTA": Arm(_cotta(), PLAIN),
    "without views": Arm(_cotta(symmetric=True, views=False), SYMMETRIC),
    "without average": Arm(_cotta(), _rates(1e-4, 3e-5, 1e-5)),
    "without restoration": Arm(_cotta(r=0.0), PLAIN[:1] + PLAIN[2:]),
    "Tent and views": Arm(lambda net, setting, n_views: ViewedTent(net, setting.lr, n_views), _rates(1e-3, 1e-2)),
    # for the long stream, where the three brakes have time; all learn without views, by the symmetric loss
    "without average, without views": Arm(_cotta(symmetric=True, views=False), _rates(1e-3, 3e-4, 1e-4, 3e-5)),
    "without restoration, without views": Arm(_cotta(0.0, True, False), SYMMETRIC),
}
