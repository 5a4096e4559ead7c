"""The arms of CoTTA's experiment: each method with its settings, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from ...data import load
from ...fitting import predict
from ..baselines.bn_adapt import BNAdapt
from ..baselines.tent import Tent
from ..core.adapted import freeze
from ..core.views import RandomViews
from ..cotta import CoTTA

Wrap = Callable[[nn.Module], nn.Module]


def published_threshold(net: nn.Module, name: str) -> float:
    """The authors' rule: the 5 % quantile of the source's confidence on its training images, minus 0.05."""
    sure = predict(net, load(name).train.x).softmax(1).amax(1)
    return float(sure.quantile(0.05)) - 0.05


def plain(net: nn.Module, lr: float, m: float, r: float = 0.01) -> nn.Module:
    return CoTTA(net, lr, m, r, n_views=0, symmetric=True)


class WholeTent(Tent):
    """Tent over all parameters."""

    def reset(self) -> None:
        super().reset()
        every = list(self.model.parameters())
        freeze(every, trainable=every)
        self.optimizer = self.optimizer_factory(every, lr=self.lr)


def arms_of(name: str, chosen: Mapping[str, str], everything: bool) -> dict[str, Wrap]:
    lr, m = (float(word) for word in chosen["CoTTA"].split())
    flip = name != "mnist5k"  # a mirrored 2 is not a 2

    def views(net: nn.Module, lr: float = 1e-3) -> nn.Module:
        return CoTTA(net, lr, n_views=4, threshold=2.0, views=RandomViews(0, flip))

    def rule(net: nn.Module) -> nn.Module:
        return CoTTA(net, n_views=4, threshold=published_threshold(net, name), views=RandomViews(0, flip))

    arms: dict[str, Wrap] = {
        "source": lambda net: net,
        "BN-adapt": BNAdapt,
        "Tent, tuned": partial(Tent, lr=float(chosen["Tent"])),
        "CoTTA, tuned": partial(plain, lr=lr, m=m),
        "all-parameter Tent, tuned": partial(WholeTent, lr=float(chosen["all-parameter Tent"])),
        "no average, tuned": partial(plain, lr=float(chosen["no average"]), m=0.0),
        "CoTTA, rule": rule,
        "CoTTA, views": views,
    }
    if everything:
        arms |= {
            "CoTTA, views, lr 0": partial(views, lr=0.0),
            "CoTTA, tuned, m 0": partial(plain, lr=lr, m=0.0),
            "CoTTA, tuned, r 0": partial(plain, lr=lr, m=m, r=0.0),
            "CoTTA, tuned, r 0.1": partial(plain, lr=lr, m=m, r=0.1),
            "Tent, lr 0.03": partial(Tent, lr=3e-2),
            "CoTTA, lr 0.03, m 0.999": partial(plain, lr=3e-2, m=0.999),
            "Tent, lr 0.1": partial(Tent, lr=0.1),
            "CoTTA, lr 0.1, m 0.999": partial(plain, lr=0.1, m=0.999),
        }
    return arms
