r"""AdaB2N with a large backbone: what the guarded cell of the chapter runs.

The online protocol of the published code (``lvyilin/AdaB2N@9aaba7e``): one epoch, batches of 10, DER++ with twice 10
replayed, plain SGD; images are stored as they came, and cropped and mirrored at random whenever they are used. The
network is a ResNet-18 for small images: its first convolution is 3 x 3 without stride, and there is no pooling after
it.

>>> from peftref.data import load
>>> from peftref.continual.core.streams import class_incremental
>>> from peftref.models import SmallCNN
>>> tasks = class_incremental(load("mnist5k"), 5, per_class=4)
>>> methods = {"BatchNorm": batch_norm, "AdaB2N": adab2n(kappa=0.4, strength=0.1)}
>>> table = run_at_scale(lambda: SmallCNN(width=4), tasks, methods, buffer=20, seeds=[0], device="cpu")
>>> table.index.tolist()
[('BatchNorm', 0), ('AdaB2N', 0)]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ...at_scale import pick_device, protocol, shifted_crop
from ...models.cnn import Normalised
from ..adab2n import balance, convert
from ..baselines.rehearsal import DERpp
from ..core.metrics import summary
from ..core.replay import Reservoir
from ..core.rule import FineTune
from ..core.streams import Task
from ..core.train import learn

__all__ = ["adab2n", "batch_norm", "cifar_resnet18", "exchange", "run_at_scale", "three_passes"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2615)
Before = Callable[[int], None]
Method = Callable[[nn.Module, FineTune, Sequence[Task]], Before]


def cifar_resnet18(num_classes: int = 10, **kwargs: Any) -> Normalised:
    """timm's ResNet-18 for images of 32 x 32 in [0, 1]; ``kwargs`` are passed on to ``timm.create_model``."""
    try:
        import timm
    except ImportError as error:
        raise ImportError("cifar_resnet18 needs timm: pip install 'peftref[vision]'") from error
    net: Any = timm.create_model("resnet18", num_classes=num_classes, **kwargs)
    net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return Normalised(net, CIFAR10_MEAN, CIFAR10_STD)


def batch_norm(net: nn.Module, rule: FineTune, tasks: Sequence[Task]) -> Before:
    """The network as it is."""
    return lambda task: None


def three_passes(net: nn.Module, rule: FineTune, tasks: Sequence[Task]) -> Before:
    """The network as it is, called once for the new images and once for each draw, as DER++ is published."""
    assert isinstance(rule, DERpp)
    rule.forwards = "each"
    return lambda task: None


def exchange(replace: Callable[[nn.Module], object]) -> Method:
    """Other layers by ``replace(net)``, such as ``partial(replace_batch_norms, make=group_norm)``."""

    def method(net: nn.Module, rule: FineTune, tasks: Sequence[Task]) -> Before:
        replace(net)
        return lambda task: None

    return method


def adab2n(kappa: float, strength: float, start: int = 0, renormalize: bool = False) -> Method:
    """Every BatchNorm layer an AdaB2N, and the rule told the tasks."""

    def method(net: nn.Module, rule: FineTune, tasks: Sequence[Task]) -> Before:
        convert(net, len(tasks), kappa, renormalize=renormalize)
        return balance(rule, net, tasks, strength, start)

    return method


def run_at_scale(
    build: Callable[[], nn.Module],
    tasks: Sequence[Task],
    methods: Mapping[str, Method],
    *,
    buffer: int = 500,
    lr: float = 0.03,
    alpha: float = 0.2,
    beta: float = 0.5,
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Each method on the same stream, from the same weights of each seed.

    Args:
        build: makes the untrained network; called under the seed.
        tasks: of :func:`peftref.continual.core.streams.class_incremental`.
        methods: name -> what to do with network and rule before training.
        buffer: images in it (500: published).
        lr: of plain SGD (.03: published).
        alpha: of DER++ (.2: published for this buffer).
        beta: of DER++ (.5: published for this buffer).
        seeds: of the weights, the order of the batches, the buffer and the augmentation.
        device: default: a GPU where there is one.

    Returns:
        Last and incremental accuracy, forgetting, transfer, plasticity in %; rows (method, seed). ``attrs["protocol"]``
        says with what.
    """
    device = pick_device(device)
    moved = [task.to(device) for task in tasks]
    rows = {}
    for name, method in methods.items():
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                net = build().to(device)
            rule = DERpp(Reservoir(buffer, seed), alpha=alpha, beta=beta)
            rule.forward = partial(_augmented, torch.Generator().manual_seed(seed))
            before = method(net, rule, moved)
            rows[name, seed] = summary(learn(net.to(device), moved, rule, lr=lr, seed=seed, before=before))
    found = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["method", "seed"])
    found.attrs["protocol"] = protocol(
        device,
        tasks=[list(task.names) for task in tasks],
        train=sum(len(task.train.y) for task in tasks),
        test=sum(len(task.test.y) for task in tasks),
        rule="DER++",
        buffer=buffer,
        lr=lr,
        alpha=alpha,
        beta=beta,
        batch_size=10,
        epochs=1,
        seeds=list(seeds),
        weights=None,
    )
    return found


def _augmented(generator: torch.Generator, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits: Tensor = model(shifted_crop(x, generator))
    return logits
