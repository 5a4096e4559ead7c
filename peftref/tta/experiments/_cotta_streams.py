"""Networks, streams and measurements of CoTTA's experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from ...data import ORDERS, Split, Stream, continual, load
from ...data.corruptions import EXTRA
from ...data.domains import generator_for
from ...fitting import predict
from ...models import cifar_resnet, pretrained
from ..baselines.bn_adapt import BNAdapt
from ..cotta import confidence
from ._cotta_arms import ARMS, Setting
from .evaluate import mean_error, run

__all__ = ["Size", "clean_errors", "measure", "rule", "tune"]

WEIGHTS = "resnet20-12fca82f.th"  # of akamaster/pytorch_resnet_cifar10


class Size(NamedTuple):
    """How much of everything.

    Attributes:
        network: "resnet20" on CIFAR-10, or "shipped" on the embedded garments.
        images: of a seed, in every domain.
        batch: images in a batch.
        domains: how many corruptions follow each other.
        visit: images of a visit in the long stream.
        rounds: of the long stream.
        views: N.
        jobs: processes.
    """

    network: str
    images: int
    batch: int
    domains: int
    visit: int
    rounds: int
    views: int
    jobs: int


class InBfloat16(nn.Module):
    """A network whose convolutions and products run in bfloat16; weights and answers stay float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.float()


def source(size: Size, data: Path | None, exact: bool = False) -> nn.Module:
    """The network before any shift; ``exact``: in float32."""
    if size.network == "shipped":
        return pretrained("fashion8k")
    net = cifar_resnet(_folder(data) / WEIGHTS)
    return net if exact else InBfloat16(net)


def _folder(data: Path | None) -> Path:
    if data is None:
        raise ValueError(f"data: expected the folder that holds cifar-10-batches-py and {WEIGHTS}, got None")
    return data


def images(size: Size, data: Path | None) -> tuple[Tensor, Tensor]:
    """Test images and labels, in one fixed order drawn by a generator: the classes are mixed."""
    whole = load("fashion8k") if size.network == "shipped" else load("cifar10", data)
    rows = torch.randperm(len(whole.test.y), generator=generator_for("cotta"))
    return whole.test.x[rows], whole.test.y[rows]


def stream(size: Size, data: Path | None, seed: int) -> Stream:
    """One round: the images of this seed under one corruption after the other, in an order of its own."""
    x, y = images(size, data)
    rows = slice(size.images * seed, size.images * (seed + 1))
    return continual(Split(x[rows], y[rows]), ORDERS[seed][: size.domains], batch_size=size.batch, seed=seed)


def validation(size: Size, data: Path | None) -> Stream:
    """Images and corruptions that no other stream has, three times."""
    x, y = images(size, data)
    rows = slice(len(y) - size.images, len(y))
    return continual(Split(x[rows], y[rows]), EXTRA[: size.domains], batch_size=size.batch, cycles=3, seed=9)


def long_stream(size: Size, data: Path | None, seed: int) -> Iterator[Stream]:
    """Rounds over the corruptions, each visit with images drawn anew from all that are not for validation."""
    x, y = images(size, data)
    generator = generator_for("cotta, rounds", seed)
    for r in range(size.rounds):
        for name in ORDERS[seed][: size.domains]:
            rows = torch.randperm(len(y) - size.images, generator=generator)[: size.visit]
            yield continual(Split(x[rows], y[rows]), [name], batch_size=size.visit, seed=1000 * seed + r)


def tune(arm: str, size: Size, data: Path | None) -> dict[str, float]:
    """Error in % of each setting of the grid on the validation stream; "0.001 0.99" is a learning rate and m."""
    found = _spread(size, _tried, [(arm, setting, size, data) for setting in ARMS[arm].grid])
    return {f"{s.lr:g} {s.m:g}": error for s, error in zip(ARMS[arm].grid, found, strict=True)}


def _tried(arm: str, setting: Setting, size: Size, data: Path | None) -> float:
    torch.set_num_threads(1)
    method = ARMS[arm].wrap(source(size, data), setting, size.views)
    return mean_error(run(method, validation(size, data)))


def measure(
    arm: str, setting: Setting, size: Size, data: Path | None, seeds: Sequence[int], long: bool = False
) -> list[dict[str, Any]]:
    """An arm on the stream of every seed: error in % by corruption, or by round, and mean."""
    return _spread(size, _long if long else _short, [(arm, setting, size, data, seed) for seed in seeds])


def _short(arm: str, setting: Setting, size: Size, data: Path | None, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    method = ARMS[arm].wrap(source(size, data), setting, size.views)
    done = run(method, stream(size, data, seed))
    table = done.batches.groupby("domain", sort=False)[["wrong", "n"]].sum()
    return {"error": mean_error(done), "domains": (100 * table.wrong / table.n).to_dict()}


def _long(arm: str, setting: Setting, size: Size, data: Path | None, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    method = ARMS[arm].wrap(source(size, data), setting, size.views)
    method.eval()
    errors = []
    moved = _Drift()
    for visit in long_stream(size, data, seed):
        with torch.no_grad():
            wrong = method(visit.x).argmax(1) != visit.y
        errors.append(100 * float(wrong.float().mean()))
        moved.look(method)
    rounds = np.reshape(errors, (size.rounds, -1)).mean(1)
    return {"error": float(np.mean(errors)), "rounds": rounds.tolist(), "drift": moved.drift, "move": moved.move}


class _Drift:
    """After every batch: distance of the student from the source, and length of its last move."""

    def __init__(self) -> None:
        self.drift: list[float] = []
        self.move: list[float] = []
        self.last: Tensor | None = None

    def look(self, method: nn.Module) -> None:
        if not hasattr(method, "student"):
            return
        now = torch.cat([p.detach().flatten() for p in method.get_submodule("student").parameters()])
        start = torch.cat([p.flatten() for p in method.get_submodule("source").parameters()])
        self.drift.append(round(float((now - start).norm()), 4))
        self.move.append(round(float((now - (start if self.last is None else self.last)).norm()), 4))
        self.last = now


def rule(size: Size, data: Path | None, seeds: Sequence[int]) -> dict[str, Any]:
    """The authors' threshold, the 5 % quantile of the source's confidence on training images minus 0.05, and its use.

    ``share``: of the batches of each seed whose confidence, of BN-adapt, is below it.
    """
    torch.set_num_threads(1)
    net = source(size, data)
    whole = load("fashion8k") if size.network == "shipped" else load("cifar10", data)
    sure = predict(net, whole.train.x[:10_000]).softmax(1).amax(1)
    threshold = float(sure.quantile(0.05)) - 0.05
    anchor = BNAdapt(net)
    share = [
        float(np.mean([float(confidence(anchor(batch.x))) < threshold for batch in stream(size, data, seed)]))
        for seed in seeds
    ]
    return {"threshold": threshold, "share": share}


def clean_errors(size: Size, data: Path | None, seeds: Sequence[int]) -> Mapping[str, list[float]]:
    """Error in % on clean test images: as is, batch statistics, and both in float32."""
    torch.set_num_threads(1)
    x, y = images(size, data)
    found: dict[str, list[float]] = {}
    for name, net in (("", source(size, data)), (", float32", source(size, data, exact=True))):
        for kind, model in (("source", net), ("BN-adapt", BNAdapt(net))):
            found[kind + name] = []
            for seed in seeds:
                rows = slice(size.images * seed, size.images * (seed + 1))
                parts = x[rows].split(size.batch)
                with torch.no_grad():
                    answers = torch.cat([model(part) for part in parts]).argmax(1)
                found[kind + name].append(100 * float((answers != y[rows]).float().mean()))
    return found


def _spread(size: Size, function: Any, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """In processes that end with their work, so that their time is counted."""
    if size.jobs == 1:
        return [function(*call) for call in calls]
    found: list[Any] = Parallel(size.jobs, backend="multiprocessing")(delayed(function)(*call) for call in calls)
    return found
