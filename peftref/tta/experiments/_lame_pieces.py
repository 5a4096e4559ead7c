"""The pieces of LAME's experiment: streams and orders, one pass of the network over a domain, all that follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...at_scale import Resized
from ...data import dirichlet, load, read_tiny_imagenet
from ...data.domains import generator_for, shift
from ...models import efficientnet_lite0, pretrained
from ..baselines.bn_adapt import BNAdapt
from ..baselines.tent import Tent
from ..core.graphs import Neighbours, affinity
from ..lame import laplacian_assign

LENGTH = 16  # photographs of a class in a stream: the longest run
BLOCK = 96  # images that pass the network at a time
#: What LAME is run with on every order. "rbf", k = 5, strength 1 is the published default.
KINDS: dict[str, dict[str, Any]] = {"rbf": {"kind": "rbf"}, "knn": {"kind": "knn"}}
#: And on the two extreme orders.
ABLATIONS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "rbf, one iteration": {"kind": "rbf", "max_iterations": 1},
    "rbf, strength 0.3": {"kind": "rbf", "strength": 0.3},
    "rbf, strength 3": {"kind": "rbf", "strength": 3.0},
    "rbf, k = 3": {"kind": "rbf", "k": 3},
    "rbf, k = 10": {"kind": "rbf", "k": 10},
    "knn, k = 1": {"kind": "knn", "k": 1},
    "knn, k = 15": {"kind": "knn", "k": 15},
    "rbf, row sums 5": {"kind": "rbf", "row_sum": 5.0},
}
#: What runs the network again for each order; the number is TENT's learning rate.
ONLINE: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "BN-adapt": lambda net, _: BNAdapt(net),
    "TENT": lambda net, rate: Tent(net, rate),
}


def deal(y: Tensor, seeds: int, share: int, length: int = LENGTH) -> list[Tensor]:
    """Disjoint streams: rows ``(classes / share, length)`` of each, and of one more for the choice of a rate.

    Args:
        y: class of each image.
        seeds: streams wanted, not counting that for the choice.
        share: 2 gives each stream another half of the classes.
        length: images of a class in a stream.

    Raises:
        ValueError: too few images of a class.

    >>> first, second, choice = deal(torch.arange(4).repeat_interleave(8), 2, share=1, length=2)
    >>> first.shape, len(torch.cat([first, second, choice]).unique())
    (torch.Size([4, 2]), 24)
    """
    generator = torch.Generator().manual_seed(0)
    rounds = -(-(seeds + 1) // share)
    rows = []
    for label in y.unique():
        members = (y == label).nonzero()[:, 0]
        if len(members) < rounds * length:
            raise ValueError(f"y: expected {rounds * length} images of each class, got {len(members)} of {int(label)}")
        rows.append(members[torch.randperm(len(members), generator=generator)][: rounds * length].view(rounds, length))
    found = []
    for block in torch.stack(rows, 1):  # (classes, length)
        found += list(block[torch.randperm(len(block), generator=generator)].chunk(share))
    return found[: seeds + 1]


def in_runs(rows: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """The rows of a stream ``(C, n)`` in one order: runs of ``length`` of one class, the runs shuffled."""
    shuffled = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in rows])
    runs = shuffled.reshape(-1, length)
    return runs[torch.randperm(len(runs), generator=generator)].flatten()


def load_images(images: str, side: int, data: Path | None) -> tuple[Tensor, Tensor, nn.Module]:
    if images == "fashion8k":
        test = load("fashion8k").test
        return test.x, test.y, pretrained("fashion8k")
    if data is None:
        raise ValueError("data: expected the folder that holds tiny-imagenet-200, got None")
    val = read_tiny_imagenet(data)
    net = Resized(efficientnet_lite0(val.wnids), side).eval()
    return val.x.float().div_(255), val.y, net


def shifted(x: Tensor, name: str, severity: int) -> Tensor:
    generator = generator_for(name, severity)
    return torch.cat([shift(block, name, severity, generator, "cifar") for block in x.split(500)])


def ordered(y: Tensor, rows: Tensor, order: int | str, seed: int) -> Tensor:
    """One order of a stream, the same for every method and domain."""
    generator = generator_for("order", order, seed)
    if order == "Dirichlet":
        flat = rows.flatten()
        return flat[dirichlet(0.1, min_size=1)(y[flat], generator)]
    return in_runs(rows, int(order), generator)


@torch.no_grad()
def solve(
    net: Any, x: Tensor, y: Tensor, streams: Sequence[Tensor], name: str, severity: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """One pass of the network over a domain, then LAME with every variant on every order."""
    log_q, features = _outputs(net, x, torch.cat([rows.flatten() for rows in streams]), name, severity)
    errors: dict[str, list[float]] = {}
    votes: dict[str, list[list[float]]] = {}
    classes: dict[str, list[float]] = {}
    for order in (*settings["lengths"], "Dirichlet"):
        for n in settings["batches"]:
            for seed, rows in enumerate(streams):
                at = ordered(y, rows, order, seed)
                at = at[: len(at) // n * n].view(-1, n)
                label = y[at]
                q = log_q[at]
                extreme = order in (1, LENGTH) and name in settings["ablated"]
                variants = KINDS | ABLATIONS if extreme else KINDS
                errors.setdefault(f"source, {name}, {n}, {order}", []).append(_error(q, label))
                for variant, options in variants.items():
                    z = _lame(q, features[at], **options)
                    errors.setdefault(f"{variant}, {name}, {n}, {order}", []).append(_error(z, label))
                votes.setdefault(f"{name}, {n}, {order}", []).append(_votes_right(q, features[at], label))
                spanned = float(np.mean([len(row.unique()) for row in label]))
                classes.setdefault(f"{n}, {order}", []).append(spanned)
    return {"errors": errors, "votes": votes, "classes": classes}


def _outputs(net: Any, x: Tensor, used: Tensor, name: str, severity: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and features of the images in ``used``, at their places."""
    log_q = features = torch.empty(0)
    images = shifted(x[used], name, severity)
    for rows, block_of_images in zip(used.split(BLOCK), images.split(BLOCK), strict=True):
        h = net.forward_features(block_of_images)
        block = net.forward_head(h).log_softmax(-1)
        phi = net.forward_head(h, pre_logits=True)
        if not log_q.numel():
            log_q = torch.full((len(x), block.shape[1]), torch.nan)
            features = torch.full((len(x), phi.shape[1]), torch.nan)
        log_q[rows] = block
        features[rows] = phi
    return log_q, features


def _lame(log_q: Tensor, features: Tensor, *, strength: float = 1.0, max_iterations: int = 100, **graph: Any) -> Tensor:
    row_sum = graph.pop("row_sum", None)
    w = affinity(features, **graph)
    if row_sum is not None:
        assert isinstance(w, Tensor)  # rbf
        w = row_sum * w / w.sum(-1, keepdim=True)
    return laplacian_assign(log_q, w, strength, max_iterations=max_iterations).z


def _votes_right(log_q: Tensor, features: Tensor, label: Tensor) -> list[float]:
    """Of the five nearest neighbours: share in % of the image's class, and of those that the network gives this class.

    The third number is the mean row sum of the rbf affinity without its diagonal.
    """
    near = affinity(features, "knn")
    assert isinstance(near, Neighbours)
    flat = near.index.flatten(1)
    share = []
    for t in (label, log_q.argmax(-1)):
        seen = t.gather(1, flat).view(*label.shape, -1)
        share.append(100 * float((seen == label[..., None]).float().mean()))
    w = affinity(features, "rbf")
    assert isinstance(w, Tensor)
    return [*share, float(w.sum(-1).mean()) - 1]


def online(method: nn.Module, x: Tensor, y: Tensor, rows: Tensor, batch_size: int) -> float:
    """Error in % of the answers given on the way."""
    wrong = 0
    for at in rows.split(batch_size):
        with torch.no_grad():  # methods that learn switch gradients on themselves
            wrong += int((method(x[at]).argmax(-1) != y[at]).sum())
    return 100 * wrong / len(rows)


def _error(z: Tensor, label: Tensor) -> float:
    return 100 * float((z.argmax(-1) != label).float().mean())
