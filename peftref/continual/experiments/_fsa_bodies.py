"""Bodies and heads of the recorded run of first session adaptation: one body on one stream, and what it gives.

>>> sessions(4, 10)
[(0, 4), (4, 9), (9, 10)]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Split, corrupt, load, read_tiny_imagenet
from ...models import efficientnet_lite0, pretrained
from ..core.film import EFFICIENTNET
from ..core.lda import LDA, discriminant
from ..fsa import cosine_distance, embed, first_session

__all__ = ["Arm", "World", "learned", "sessions"]

RIDGES = (0.1, 1.0, 10.0, 100.0)  # relative
NEAREST = 1e9  # an absolute ridge at which LDA is the nearest class mean
STEP = 5  # classes of each session after the first, or what is left
BATCH = 20
LINEAR_RATES = (1e-3, 1e-2)
LINEAR_EPOCHS = 20
HELD_OUT = 60  # classes of Tiny-ImageNet for the tuning runs


@dataclass(frozen=True)
class Arm:
    """One body on one stream."""

    seed: int
    domain: str = "clean"
    shots: int = 20
    kind: str = "none"
    rate: float = 0.0
    first: int = 10
    epochs: int = 6

    @property
    def key(self) -> str:
        """Name of the piece of work."""
        return f"{self.domain} {self.shots} {self.kind} {self.rate:g} first {self.first} x {self.epochs} @ {self.seed}"


class World:
    """A pre-trained body and the images that its streams are drawn from.

    Args:
        source: "tiny_imagenet", with EfficientNet-Lite0; or "fashion8k", with a small network pre-trained on digits.
        root: folder of Tiny-ImageNet.
        classes: of a stream.
        test: test images of each class.
    """

    def __init__(self, source: str, root: Path | None, classes: int, test: int) -> None:
        self.classes = classes
        self.test = test
        self.large = source == "tiny_imagenet"
        if self.large:
            assert root is not None
            train, val = (read_tiny_imagenet(root, part, 100) for part in ("train", "val"))
            self.train = Split(train.x, train.y)
            self.val = Split(val.x, val.y)
            self.body: nn.Module = efficientnet_lite0().to(memory_format=torch.channels_last)
            self.layers: str | None = EFFICIENTNET
        else:
            data = load(source)
            self.train = Split((255 * data.train.x).byte(), data.train.y)
            self.val = Split((255 * data.test.x).byte(), data.test.y)
            self.body = pretrained("mnist5k")
            self.layers = None

    def checksum(self) -> str:
        """SHA-256 of all images that streams are drawn from, in 8 bits."""
        digest = hashlib.sha256()
        for split in (self.train, self.val):
            digest.update(split.x.numpy().tobytes())
        return digest.hexdigest()

    def stream(self, arm: Arm, held_out: bool) -> tuple[Split, Split]:
        """Training and test images of an arm, labels in the order of arrival.

        Args:
            arm: seed, domain and shots.
            held_out: classes and images that are only used to choose settings.
        """
        rng = np.random.default_rng(arm.seed)
        total = int(self.train.y.max()) + 1
        pool = np.random.default_rng(0).permutation(total)
        if self.large:  # of ten classes none can be spared
            pool = pool[:HELD_OUT] if held_out else pool[HELD_OUT:]
        order = rng.permutation(pool)[: self.classes]
        train = _drawn(self.train, order, arm.shots, rng)
        test = _drawn(self.val, order, self.test, rng)
        if arm.domain == "clean":
            return train, test
        return Split(_noisy(train.x, arm.seed), train.y), Split(_noisy(test.x, arm.seed + 1000), test.y)


def _drawn(split: Split, order: Any, each: int, rng: np.random.Generator) -> Split:
    """``each`` images of every class in ``order``, class after class, in [0, 1]."""
    rows = [rng.permutation(np.flatnonzero(split.y.numpy() == c))[:each] for c in order]
    labels = torch.arange(len(order)).repeat_interleave(torch.tensor([len(r) for r in rows]))
    return Split(split.x[np.concatenate(rows)].float() / 255, labels)


def _noisy(x: Tensor, seed: int) -> Tensor:
    return corrupt(x, "gaussian_noise", 3, table="imagenet", seed=seed)


def learned(world: World, arm: Arm, held_out: bool = False) -> dict[str, Any]:
    """Adapt a body to the first session, and fit the head to all sessions, one after the other.

    Returns:
        Accuracy in % over the classes seen, after each session, for each relative ridge; after the last session with
        the scatter within classes, with the official code's ridge, and of the nearest class mean; the loss of each
        epoch; the mean cosine distance of the features of the first session; linear heads on the unadapted body; how
        many parameters of the body the first session changed.
    """
    train, test = world.stream(arm, held_out)
    now = train.y < arm.first
    losses: list[float] = []
    body = first_session(
        world.body,
        train.x[now],
        train.y[now],
        arm.kind,
        lr=arm.rate or 1.0,
        statistics="source",
        epochs=arm.epochs,
        batch_size=BATCH,
        layers=world.layers,
        seed=arm.seed,
        after=lambda _, loss: losses.append(loss),
    )
    h, g = (features(body, x) for x in (train.x, test.x))
    curve = []
    head = LDA()
    for start, stop in sessions(arm.first, world.classes):
        now = (train.y >= start) & (train.y < stop)
        head.partial_fit(h[now], train.y[now])
        seen = test.y < stop
        curve.append([_accuracy(head, g[seen], test.y[seen], ridge=0.0, ridge_rel=ridge) for ridge in RIDGES])
    first = train.y < arm.first
    return {
        "curve": np.transpose(curve),
        "within": [_accuracy(head, g, test.y, "within", ridge=0.0, ridge_rel=ridge) for ridge in RIDGES],
        "official": _accuracy(head, g, test.y),
        "nearest": _accuracy(head, g, test.y, ridge=NEAREST),
        "losses": losses,
        "distance": float(cosine_distance(h[first])),
        "linear": linear(h.float(), train.y, g.float(), test.y, arm) if arm.kind == "none" else None,
        "moved": sum(int((p != q).sum()) for p, q in zip(body.parameters(), world.body.parameters(), strict=True)),
    }


@torch.no_grad()
def features(body: nn.Module, x: Tensor) -> Tensor:
    """Features ``(N, d)``, in float64."""
    return torch.cat([embed(body, part) for part in x.split(100)]).double()


def sessions(first: int, classes: int) -> list[tuple[int, int]]:
    """Start and end of each session among the classes."""
    ends = [*range(first, classes, STEP), classes]
    return list(zip([0, *ends], ends, strict=False))


def linear(h: Tensor, y: Tensor, g: Tensor, wanted: Tensor, arm: Arm) -> dict[str, list[float]]:
    """Linear heads, trained on one session after the other by Adam.

    Args:
        h: features to train on.
        y: their classes.
        g: features to test on.
        wanted: their classes.
        arm: seed and size of the first session.

    Returns:
        For each rate of ``LINEAR_RATES``, accuracy in % over all classes at the end, where all classes compete in the
        loss ("global") and where only those of the session do ("local").
    """
    classes = int(y.max()) + 1
    found: dict[str, list[float]] = {"global": [], "local": []}
    for loss, rate in [(loss, rate) for loss in found for rate in LINEAR_RATES]:
        generator = torch.Generator().manual_seed(arm.seed)
        head = nn.Linear(h.shape[1], classes)
        nn.init.normal_(head.weight, std=0.01, generator=generator)
        nn.init.zeros_(head.bias)
        for start, stop in sessions(arm.first, classes):
            now = ((y >= start) & (y < stop)).nonzero()[:, 0]
            competing = slice(start, stop) if loss == "local" else slice(0, classes)
            optimizer = torch.optim.Adam(head.parameters(), rate)
            for _ in range(LINEAR_EPOCHS):
                for i in now[torch.randperm(len(now), generator=generator)].split(BATCH):
                    optimizer.zero_grad()
                    F.cross_entropy(head(h[i])[:, competing], y[i] - competing.start).backward()
                    optimizer.step()
        found[loss].append(100 * (head(g).argmax(1) == wanted).double().mean().item())
    return found


def _accuracy(
    head: LDA, x: Tensor, y: Tensor, scatter: str = "total", ridge: float = 1.0, ridge_rel: float = 0.0
) -> float:
    coef, bias = discriminant(head.moments, scatter, ridge, ridge_rel)
    return 100 * ((x @ coef.T + bias).argmax(1) == y).double().mean().item()
