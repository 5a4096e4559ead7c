r"""LAME on photographs: what decides is how many classes a batch spans.

EfficientNet-Lite0 with its ImageNet classifier, restricted to the 200 classes of Tiny-ImageNet, meets validation
photographs, clean and corrupted. A seed has 100 of the classes with 16 photographs each, and no photograph is in two
seeds. The photographs come in *runs* of :math:`L` of one class, the runs in random order: :math:`L=1` is the iid
stream, :math:`L=16` is sorted by class. A batch of :math:`N` then holds about :math:`N/L` classes, and every order has
the same photographs. LAME sees only outputs, so a domain costs one pass of the network and all orders are solved from
it; BN-adapt and TENT run the network again for each order.

The size ``smoke`` is the same on the embedded garments; ``t4`` and ``gpu`` are the published backbones on ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...at_scale import Resized
from ...data import dirichlet, load, read_tiny_imagenet, sorted_by_class
from ...data.domains import generator_for, shift
from ...models import efficientnet_lite0, from_timm, pretrained
from ...results import finding
from ..baselines.bn_adapt import BNAdapt
from ..baselines.tent import Tent
from ..core.graphs import Neighbours, affinity
from ..lame import LAME, laplacian_assign
from .at_scale import imagenet_folder, run_at_scale

__all__ = ["MINUTES", "NEEDS", "PRESETS", "deal", "in_runs", "run"]

LENGTH = 16  # photographs of a class in a stream: the longest run
BLOCK = 96  # images that pass the network at a time
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "images": "fashion8k",
        "side": 28,
        "seeds": 2,
        "domains": [["gaussian_noise", 3]],
        "ablated": ["gaussian_noise"],
        "adapted": [["gaussian_noise", 3]],
        "lengths": [1, 4, 16],
        "batches": [16, 32],
        "rates": [1e-3],
    },
    "cpu": {
        "images": "tiny_imagenet",
        "side": 96,
        "seeds": 5,
        "domains": [
            ["clean", 1],
            ["gaussian_noise", 1],
            ["fog", 3],
            ["contrast", 3],
        ],
        "ablated": ["clean", "gaussian_noise"],
        "adapted": [["gaussian_noise", 1]],
        "lengths": [1, 2, 4, 8, 16],
        "batches": [16, 64],
        "rates": [1e-4, 3e-4, 1e-3],
    },
    "t4": {"backbone": "resnet50.a1_in1k", "limit": 2000, "corruptions": ["gaussian_noise", "pixelate"], "seeds": 2},
    "gpu": {
        "backbone": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "limit": 5000,
        "corruptions": ["gaussian_noise", "defocus_blur", "snow", "contrast", "pixelate"],
        "seeds": 2,
    },
}
MINUTES = {"smoke": 0.05, "cpu": 25, "t4": 10, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": ("vision", "tiny_imagenet"),
    "t4": ("cuda", "vision", "imagenet"),
    "gpu": ("cuda", "vision", "imagenet"),
}
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
ADAPTING: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "BN-adapt": lambda net, _: BNAdapt(net),
    "TENT": lambda net, rate: Tent(net, rate),
}


def run(each: Any, *, data: Path | None = None, **settings: Any) -> dict[str, Any]:
    """The experiment; see :mod:`peftref.results`."""
    return _published(each, data, **settings) if "backbone" in settings else _photographs(each, data, **settings)


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


def _photographs(each: Any, data: Path | None, **settings: Any) -> dict[str, Any]:
    seeds = settings["seeds"]
    torch.set_num_threads(1)
    x, y, net = _load(settings["images"], settings["side"], data)
    share = 2 if len(y.unique()) > 10 else 1
    *streams, choice = deal(y, seeds, share)
    orders = [str(length) for length in settings["lengths"]] + ["Dirichlet"]
    solved = {
        name: each(f"LAME, {name} {severity}", _solve, net, x, y, streams, name, severity, settings)
        for name, severity in settings["domains"]
    }
    adapted = {}
    rate = {}
    for name, severity in settings["adapted"]:
        images = _shifted(x, name, severity)
        rows = in_runs(choice, 1, generator_for("choice"))
        for r in settings["rates"]:
            found = each(f"choice, {name}, {r:g}", _online, Tent(net, r), images, y, rows, max(settings["batches"]))
            rate[f"{r:g}"] = found
        best = float(min(rate, key=lambda r: rate[r]))
        for method, wrap in ADAPTING.items():
            for n in settings["batches"]:
                for length in (1, LENGTH):
                    key = f"{method}, {name}, {n}, {length}"
                    adapted[key] = [
                        each(f"{key}, seed {s}", _online, wrap(net, best), images, y, _order(y, rows, length, s), n)
                        for s, rows in enumerate(streams)
                    ]
    errors = {key: value for found in solved.values() for key, value in found["errors"].items()} | adapted
    return {
        "rows": _rows(errors, settings),
        "arrays": {
            "errors": errors,
            "classes": next(iter(solved.values()))["classes"],
            "votes": {key: value for found in solved.values() for key, value in found["votes"].items()},
            "orders": orders,
        },
        "protocol": {
            "network": "EfficientNet-Lite0, ImageNet" if share == 2 else "pretrained('fashion8k', 0)",
            "classes of the classifier": len(y.unique()),
            "classes in a stream": len(streams[0]),
            "images in a stream": streams[0].numel(),
            "corruption table": "cifar",
            "reset": "before each stream",
            "TENT": {"optimiser": "Adam", "error by rate, iid, other images": rate},
        },
    }


def _load(images: str, side: int, data: Path | None) -> tuple[Tensor, Tensor, nn.Module]:
    if images == "fashion8k":
        test = load("fashion8k").test
        return test.x, test.y, pretrained("fashion8k")
    if data is None:
        raise ValueError("data: expected the folder that holds tiny-imagenet-200, got None")
    val = read_tiny_imagenet(data)
    net = Resized(efficientnet_lite0(val.wnids), side).eval()
    return val.x.float().div_(255), val.y, net


def _shifted(x: Tensor, name: str, severity: int) -> Tensor:
    generator = generator_for(name, severity)
    return torch.cat([shift(block, name, severity, generator, "cifar") for block in x.split(500)])


def _order(y: Tensor, rows: Tensor, order: int | str, seed: int) -> Tensor:
    """One order of a stream, the same for every method and domain."""
    generator = generator_for("order", order, seed)
    if order == "Dirichlet":
        flat = rows.flatten()
        return flat[dirichlet(0.1, min_size=1)(y[flat], generator)]
    return in_runs(rows, int(order), generator)


@torch.no_grad()
def _solve(
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
                at = _order(y, rows, order, seed)
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
    images = _shifted(x[used], name, severity)
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


def _online(method: nn.Module, x: Tensor, y: Tensor, rows: Tensor, batch_size: int) -> float:
    """Error in % of the answers given on the way."""
    wrong = 0
    for at in rows.split(batch_size):
        wrong += int((method(x[at]).argmax(-1) != y[at]).sum())
    return 100 * wrong / len(rows)


def _error(z: Tensor, label: Tensor) -> float:
    return 100 * float((z.argmax(-1) != label).float().mean())


def _gain(errors: Mapping[str, list[float]], key: str, method: str) -> list[float]:
    return [a - b for a, b in zip(errors[f"source, {key}"], errors[f"{method}, {key}"], strict=True)]


def _rows(errors: Mapping[str, list[float]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gains over the source in points of error: LAME averaged over the domains, the others where they were run."""
    domains = [name for name, _ in settings["domains"]]
    adapted = [name for name, _ in settings["adapted"]]
    small, large = settings["batches"]

    def row(what: str, method: str, n: int, order: int | str, among: list[str], **options: Any) -> dict[str, Any]:
        paired = [_gain(errors, f"{name}, {n}, {order}", method) for name in among]
        level = {m: float(np.mean([errors[f"{m}, {d}, {n}, {order}"] for d in among])) for m in ("source", method)}
        gains = list(np.mean(paired, axis=0))
        return finding(f"{what}: gain over the source", gains, unit="points", level=level, **options)

    title = {LENGTH: "class-sorted", "Dirichlet": "Dirichlet 0.1", 1: "iid"}
    by_class = {"where": "Fig. 2, by class", "paper": 16.0}
    iid = {"where": "Fig. 2, iid", "paper": 0.0, "claim": "paper"}
    rows = [
        row(f"LAME rbf, batch {small}, class-sorted", "rbf", small, LENGTH, domains, **by_class),
        row(f"LAME rbf, batch {small}, iid", "rbf", small, 1, domains, **iid),
        row(
            f"BN-adapt, batch {small}, class-sorted",
            "BN-adapt",
            small,
            LENGTH,
            adapted,
            where="abstract",
            claim="below",
        ),
        row(f"TENT, batch {small}, class-sorted", "TENT", small, LENGTH, adapted, where="abstract", claim="below"),
    ]
    for kind in KINDS:
        for n in (small, large):
            for order in (LENGTH, "Dirichlet", 1):
                if kind == "knn" or n == large or order == "Dirichlet":
                    rows.append(row(f"LAME {kind}, batch {n}, {title[order]}", kind, n, order, domains, where="ours"))
    for method in ADAPTING:
        for n, order in ((small, 1), (large, LENGTH), (large, 1)):
            rows.append(row(f"{method}, batch {n}, {title[order]}", method, n, order, adapted, where="ours"))
    return rows


def _published(each: Any, data: Path | None, **settings: Any) -> dict[str, Any]:
    """ImageNet-C made on the fly, severity 5, class-sorted, batches of 64: the source, TENT and LAME."""
    model = from_timm(settings["backbone"], pretrained=True)
    if data is None:
        raise ValueError("data: expected the folder that holds imagenet, one folder of images per class, got None")
    photographs = imagenet_folder(data / "imagenet", limit=settings["limit"])
    methods = {"source": lambda net: net, "TENT": lambda net: Tent(net, 2.5e-4, _sgd)}
    methods |= {"LAME": lambda net: LAME(net, "rbf")}

    def errors(name: str, seed: int) -> dict[str, float]:
        table = run_at_scale(methods, model, photographs, [name], 5, 64, sorted_by_class, seed=seed)
        return {method: float(table[method].iloc[0]) for method in methods}

    found = [[each(f"{name}, seed {s}", errors, name, s) for name in settings["corruptions"]]
             for s in range(settings["seeds"])]  # fmt: skip
    mean = {m: [float(np.mean([row[m] for row in rows])) for rows in found] for m in methods}
    gains = {m: list(np.subtract(mean["source"], mean[m])) for m in ("TENT", "LAME")}
    level = {m: float(np.mean(values)) for m, values in mean.items()}
    rows = [
        finding("LAME, class-sorted ImageNet-C: error", mean["LAME"], where="benchmark, ViT-B/16", unit="%",
                claim="paper", paper=44.1, level=level),
        finding("LAME, class-sorted ImageNet-C: gain over the source", gains["LAME"], where="benchmark, ViT-B/16",
                unit="points", paper=16.1, level=level),
    ]  # fmt: skip
    return {"rows": rows, "arrays": {"error": mean}, "protocol": {"severity": 5, "batch": 64, "order": "class-sorted"}}


def _sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)
