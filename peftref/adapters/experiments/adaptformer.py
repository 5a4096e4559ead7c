"""AdaptFormer's branch beside the MLP and behind it, by size; its variants; its scale and learning rate.

The small vision transformer that knows clothes reads digits from 800 images after fifty steps of AdamW, and, for the
scale, its last two blocks learn by SGD with momentum. Every method has the same learning rates to choose from, by
validation images alone; see :func:`untouched` for the test images. The ``gpu`` size has a ViT-B/16 learn CIFAR-100.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import load
from ...models.vit import ViT
from ..adaptformer import AdaptFormer, dead_share
from ..core.injection import adapters, inject
from ..core.layers import Layer
from ._pieces import Claim, compare_pieces, judged, protocol_of
from .at_scale import LARGE, record_large
from .transfer import Task, fresh, full, probe, shifted

__all__ = ["MINUTES", "NEEDS", "PRESETS", "RATES", "SCALES", "Straight", "entry", "run", "sweep", "untouched"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": [0, 1], "train": 40, "test": 100, "lrs": [1e-2], "steps": 1, "sgd_steps": 2},
    "cpu": {
        "seeds": [0, 1, 2, 3, 4],
        "train": 800,
        "test": 3000,
        "lrs": [1e-3, 3e-3, 1e-2, 3e-2],
        "steps": 50,
        "sgd_steps": 40,
    },
    "gpu": {"large": LARGE},
}
MINUTES = {"smoke": 0.1, "cpu": 5, "gpu": 9}
NEEDS = {"gpu": ("cuda", "cifar100")}

BLOCKS = r"(.*\.)?blocks\.\d+"
SIZES = [4, 16, 64]
SCALES = [0.1, 1.0, 10.0]
RATES = [1e-3, 1e-2, 3e-2, 1e-1, 1.0]  # of the second matrix: s^2 eta
PLACES = "Table 3b, as a review post quotes it: SSv2, direction"
SIZE_TABLE = "Table 10, as a review post quotes it: direction"


class Straight(AdaptFormer):
    """The branch without its ReLU: a matrix of rank r beside the block."""

    kind = "adaptformer_straight"

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        y: Tensor = self.s * self.up_proj(self.down_proj(self.norm(x)))
        return y


def _branch(kind: type[AdaptFormer] = AdaptFormer, **options: Any) -> Callable[[nn.Module], object]:
    chosen = {"scale": 1.0, "dropout": 0.0, **options}
    return lambda net: inject(net, kind, BLOCKS, **chosen)


SMALL = {
    f"{place}, r = {r}": _branch(placement=place, bottleneck=r) for place in ("parallel", "sequential") for r in SIZES
}
VARIANTS = {
    "parallel, LayerNorm": _branch(bottleneck=16, layernorm=True),
    "sequential, LayerNorm": _branch(bottleneck=16, placement="sequential", layernorm=True),
    "parallel, no ReLU": _branch(Straight, bottleneck=16),
}
ENDS: dict[str, Callable[[nn.Module], object]] = {"head only": probe, "all weights": full}
CLAIMS = (
    *(Claim(f"parallel - sequential, r = {r}", f"parallel, r = {r}", f"sequential, r = {r}", PLACES) for r in SIZES),
    Claim("r = 64 - r = 4", "parallel, r = 64", "parallel, r = 4", SIZE_TABLE),
    Claim("r = 16 - all weights, fifty steps", "parallel, r = 16", "all weights"),
    Claim("r = 16: LayerNorm - none", "parallel, LayerNorm", "parallel, r = 16"),
    Claim("r = 16: no ReLU - ReLU", "parallel, no ReLU", "parallel, r = 16"),
    Claim("r = 16, LayerNorm: parallel - sequential", "parallel, LayerNorm", "sequential, LayerNorm"),
)
BIG: dict[str, Callable[[nn.Module], object]] = {
    "head only": probe,
    "parallel, r = 64": _branch(bottleneck=64),
    "sequential, r = 64": _branch(bottleneck=64, placement="sequential"),
    "parallel, r = 8": _branch(bottleneck=8),
}
BIG_CLAIMS = (
    Claim("ViT-B/16: parallel - sequential, r = 64", "parallel, r = 64", "sequential, r = 64", PLACES),
    Claim("ViT-B/16: r = 64 - r = 8", "parallel, r = 64", "parallel, r = 8", SIZE_TABLE),
    Claim("ViT-B/16: r = 64 - head only", "parallel, r = 64", "head only"),
)


def run(
    each: Callable[..., Any], *, data: Path | None = None, large: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Sizes, variants and scales, or the large network.

    Args:
        each: of :func:`peftref.recording.record`.
        data: the reader's folder, for the large network.
        large: settings of the large network.
        settings: of the small ones.
    """
    if large:
        return record_large(each, BIG, BIG_CLAIMS, data, **large)
    task = untouched(settings["train"], settings["test"])
    options = {name: settings[name] for name in ("seeds", "steps", "lrs")}
    runs = compare_pieces(each, {**SMALL, **VARIANTS, **ENDS}, task, **options)
    swept = []
    for s in SCALES:
        swept += each(f"scale {s:g}", _scale, s, task, settings)
    alone = each("head alone", _alone, task, settings)
    rows = judged(runs, *CLAIMS)
    arrays = {"digits": runs.to_dict("list"), "sweep": pd.DataFrame(swept).to_dict("list"), "head alone": alone}
    return {"rows": rows, "arrays": arrays, "protocol": protocol_of(load("mnist5k"), weights="pretrained_vit()")}


def untouched(train: int, test: int) -> Task:
    """Digits to learn from and to choose by as in :func:`~peftref.adapters.experiments.transfer.shifted`, and others of
    the data set's training images to report on: trial runs for this comparison had looked at its test images.

    Args:
        train: images to learn from; a quarter as many choose the learning rate.
        test: images to report on.
    """
    used = train + train // 4
    rest = shifted("digits", used, test)  # the same draw, cut in another place
    return shifted("digits", train, train // 4)._replace(test=rest.val)


@torch.no_grad()
def entry(net: ViT, x: Tensor, block: int = 0) -> Tensor:
    """The residual stream of images at the entry of a block, ``(N, T, d)``.

    Args:
        net: the small transformer.
        x: images.
        block: which one.
    """
    tokens = net.patch_embed.get_submodule("proj")(x).flatten(2).mT
    h = torch.cat([net.cls_token.expand(len(x), -1, -1), tokens], 1) + net.pos_embed
    out: Tensor = net.blocks[:block](h)
    return out


def sweep(s: float, rate: float, seed: int, task: Task, steps: int = 40) -> tuple[Tensor, float]:
    """SGD on the last two blocks: the loss of each step, and the share of dead units at the end.

    Args:
        s: scale of the branches.
        rate: learning rate of the second matrix, ``s^2 eta``.
        seed: of the head, the branches and the batches.
        task: the digits.
        steps: updates of 16 images.
    """
    torch.manual_seed(seed)
    whole = fresh()
    cached = entry(whole, task.train.x, 2)
    tested = entry(whole, task.test.x[:300], 2)
    model = nn.Sequential(whole.blocks[2:], whole.norm, whole.head)
    inject(model, AdaptFormer, r"0\.\d", bottleneck=16, scale=s, dropout=0.0)
    branches = [p for a in adapters(model).values() for p in a.parameters()]
    last = whole.head.requires_grad_(True)
    groups = [{"params": branches, "lr": rate / s**2}, {"params": last.parameters(), "lr": 0.03}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    losses = []
    for _ in range(steps):
        i = torch.randint(len(cached), (16,))
        loss = F.cross_entropy(model(cached[i])[:, 0], task.train.y[i])  # the class token
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    dead = dead_share(model, tested)
    return torch.stack(losses), sum(dead.values()) / len(dead)


def _scale(s: float, task: Task, settings: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for rate in RATES:
        for seed in settings["seeds"]:
            losses, dead = sweep(s, rate, seed, task, settings["sgd_steps"])
            rows.append({"s": s, "rate": rate, "seed": seed, "dead": 100 * dead, "losses": losses.tolist()})
    return rows


def _alone(task: Task, settings: dict[str, Any]) -> list[list[float]]:
    """The head learns, the branches do not."""
    return [sweep(1.0, 0.0, seed, task, settings["sgd_steps"])[0].tolist() for seed in settings["seeds"]]
