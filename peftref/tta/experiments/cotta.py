r"""CoTTA on a stream whose corruptions return: tuned and published settings, BN-adapt, Tent, its parts taken away.

Each seed has its own source network (shipped with the package), its own 200 test images and its own noise; the six
corruptions come back in every cycle. Hyper-parameters of every arm are chosen on one validation stream of other images
and other corruptions. Two arms show what the parts of CoTTA add, each at a rate chosen for it: "all-parameter Tent" has
none of them, "no average" is CoTTA with :math:`m=0`, whose teacher is the student and whose symmetric loss is half an
entropy over all parameters.

"CoTTA, rule" has the published settings and the published *rule* for the threshold: the 5 % quantile of the source's
confidence on its training images, minus 0.05. "CoTTA, views" always averages over views.

The sizes ``t4`` and ``gpu`` are ImageNet-C made on the fly with the published ImageNet settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data import ORDERS, Split, Stream, continual, load, sorted_by_class
from ...fitting import predict
from ...models import from_timm, pretrained
from ...results import finding
from ..baselines.bn_adapt import BNAdapt
from ..baselines.tent import Tent
from ..core.views import RandomViews
from ..cotta import CoTTA, confidence
from ._cotta_arms import WholeTent, Wrap, arms_of, plain, published_threshold
from .at_scale import imagenet_folder, run_at_scale
from .evaluate import mean_error, run_seeds, running_error

__all__ = ["MINUTES", "NEEDS", "PRESETS", "by_cycle", "published_threshold", "run", "stream_of"]

DOMAINS = ("gaussian_noise", "glass_blur", "snow", "fog", "contrast", "pixelate")
OTHERS = ("impulse_noise", "motion_blur", "frost", "speckle_noise")
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"sets": ["mnist5k"], "seeds": [0, 1], "cycles": 1, "domains": 1, "rates": 1},
    "cpu": {"sets": ["fashion8k", "mnist5k"], "seeds": [0, 1, 2], "cycles": 4, "domains": 6, "rates": 5},
    "t4": {"backbone": "resnet50.tv_in1k", "limit": 1000, "batch": 32, "seeds": [0, 1]},
    "gpu": {"backbone": "resnet50.tv_in1k", "limit": 5000, "batch": 64, "seeds": [0, 1]},
}
MINUTES = {"smoke": 0.05, "cpu": 3, "t4": 10, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": (),
    "t4": ("cuda", "vision", "imagenet"),
    "gpu": ("cuda", "vision", "imagenet"),
}
PLACE = "Table 2: CIFAR-10-C, WRN-28-10"
RATES_OF_ALL = (3e-4, 1e-4, 1e-3, 2e-3, 4e-3)  # of the arms that train all parameters and average nothing


def run(each: Any, *, data: Path | None = None, **settings: Any) -> dict[str, Any]:
    """The experiment; see :mod:`peftref.results`."""
    return _published(each, data, **settings) if "backbone" in settings else _small(each, **settings)


def stream_of(name: str, rows: slice, domains: Sequence[str] = DOMAINS, cycles: int = 4, seed: int = 0) -> Stream:
    """Test images of a bundled set under corruptions of severity 5, in batches of 100."""
    test = load(name).test
    return continual(Split(test.x[rows], test.y[rows]), list(domains), batch_size=100, cycles=cycles, seed=seed)


def by_cycle(batches: Any, cycles: int) -> list[float]:
    """Mean error in % of each cycle, from the table of a run."""
    segments = batches.groupby("segment")[["wrong", "n"]].sum()
    error = (100 * segments.wrong / segments.n).to_numpy()
    return [float(e) for e in error.reshape(cycles, -1).mean(1)]


def _small(each: Any, **settings: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    tables: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    tuning: dict[str, Any] = {}
    for name in settings["sets"]:
        tuning[name] = each(f"{name}, choice", _tuned, name, settings["rates"], settings["domains"])
        chosen[name] = {arm: min(found, key=found.get) for arm, found in tuning[name].items()}
        arms = arms_of(name, chosen[name], everything=name == "fashion8k")
        tables[name] = {arm: each(f"{name}, {arm}", _measured, name, wrap, settings) for arm, wrap in arms.items()}
    arrays: dict[str, Any] = {"methods": tables, "tuning": tuning, "chosen": chosen}
    arrays["rule"] = {name: each(f"{name}, rule", _under_the_rule, name, settings) for name in tables}
    if "fashion8k" in tables:
        arrays["views on clean images"] = {name: each(f"{name}, clean", _clean, name) for name in tables}
        arrays["class-sorted"] = each("fashion8k, class-sorted", _class_sorted, chosen["fashion8k"])
    protocol = {"severity": 5, "batch": 100, "images of a seed": 200, "order of domains": list(DOMAINS)}
    return {"rows": _rows(tables), "arrays": arrays, "protocol": protocol | {"reset": "never", "chosen": chosen}}


def _tuned(name: str, rates: int, domains: int) -> dict[str, dict[str, float]]:
    """Validation error of every setting of each arm; "0.01 0.9" is a learning rate and m."""
    grid: dict[str, dict[str, Wrap]] = {
        "Tent": {f"{lr:g}": partial(Tent, lr=lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 0.1)[:rates]},
        "CoTTA": {
            f"{lr:g} {m:g}": partial(plain, lr=lr, m=m)
            for lr in (1e-2, 3e-3, 3e-2)[:rates]
            for m in (0.9, 0.99, 0.999)[:rates]
        },
        "all-parameter Tent": {f"{lr:g}": partial(WholeTent, lr=lr) for lr in RATES_OF_ALL[:rates]},
        "no average": {f"{lr:g}": partial(plain, lr=lr, m=0.0) for lr in RATES_OF_ALL[:rates]},
    }
    validation = stream_of(name, slice(700, 900), OTHERS[:domains], cycles=3 if rates > 1 else 1, seed=9)
    net = pretrained(name)
    return {
        arm: {
            key: mean_error(run_seeds({key: wrap}, [net], [validation], n_jobs=1)[key][0]) for key, wrap in some.items()
        }
        for arm, some in grid.items()
    }


class _Watch:
    """After every batch: distance from the source, and length of the last move."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, method: nn.Module) -> dict[str, float]:
        if not hasattr(method, "student"):
            return {}
        now = torch.cat([p.detach().flatten() for p in method.get_submodule("student").parameters()])
        source = torch.cat([p.flatten() for p in method.get_submodule("source").parameters()])
        before = source if self.last is None else self.last
        self.last = now
        return {"drift": float((now - source).norm()), "move": float((now - before).norm())}


def _measured(name: str, wrap: Wrap, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One arm on the stream of every seed."""
    found: dict[str, Any] = {"error": [], "cycles": [], "running": [], "drift": [], "move": []}
    for seed in settings["seeds"]:
        rows = slice(200 * seed, 200 * seed + 200)
        stream = stream_of(name, rows, DOMAINS[: settings["domains"]], settings["cycles"], seed)
        done = run_seeds({"": wrap}, [pretrained(name, seed)], [stream], n_jobs=1, observe=_Watch())[""][0]
        found["error"].append(mean_error(done))
        found["cycles"].append(by_cycle(done.batches, settings["cycles"]))
        found["running"].append([float(e) for e in running_error(done, window=12)])
        for column in ("drift", "move"):
            if column in done.batches:
                found[column].append([float(v) for v in done.batches[column]])
    return found


def _under_the_rule(name: str, settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """The rule's threshold for the network of each seed, and the share of batches whose confidence is below it."""
    found: dict[str, list[float]] = {"threshold": [], "share": []}
    for seed in settings["seeds"]:
        net = pretrained(name, seed)
        threshold = published_threshold(net, name)
        rows = slice(200 * seed, 200 * seed + 200)
        stream = stream_of(name, rows, DOMAINS[: settings["domains"]], settings["cycles"], seed)
        anchor = BNAdapt(net)
        below = [float(confidence(anchor(batch.x))) < threshold for batch in stream]
        found["threshold"].append(threshold)
        found["share"].append(float(np.mean(below)))
    return found


def _clean(name: str) -> dict[str, list[float]]:
    """What the views cost before any shift: error in % on clean test images."""
    test = load(name).test
    found: dict[str, list[float]] = {"as is": [], "one view": [], "mean of 4 views": []}
    for seed in range(3):
        net = pretrained(name, seed)
        views = RandomViews(seed, flip=name != "mnist5k")
        seen = torch.stack([predict(net, views(test.x)) for _ in range(4)])
        for key, z in zip(found, (predict(net, test.x), seen[0], seen.mean(0)), strict=True):
            found[key].append(100 * float((z.argmax(1) != test.y).float().mean()))
    return found


def _class_sorted(chosen: Mapping[str, str]) -> dict[str, list[float]]:
    """Severity 3, three corruptions, one class after the other, in batches of 20."""
    test = load("fashion8k").test
    arms = arms_of("fashion8k", chosen, everything=False)
    found: dict[str, list[float]] = {name: [] for name in ("source", "BN-adapt", "CoTTA, tuned")}
    for seed in range(3):
        rows = slice(200 * seed, 200 * seed + 200)
        part = Split(test.x[rows], test.y[rows])
        stream = continual(part, list(DOMAINS[:3]), 3, order=sorted_by_class, batch_size=20, seed=seed)
        for name in found:
            done = run_seeds({name: arms[name]}, [pretrained("fashion8k", seed)], [stream], n_jobs=1)
            found[name].append(mean_error(done[name][0]))
    return found


def _rows(tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    pairs: tuple[tuple[str, str, str, float | None], ...] = (
        ("CoTTA, tuned", "BN-adapt", PLACE, 4.2),
        ("CoTTA, tuned", "Tent, tuned", PLACE, 4.5),
        ("CoTTA, rule", "BN-adapt", PLACE, 4.2),
        ("CoTTA, tuned", "all-parameter Tent, tuned", "ours", None),
        ("CoTTA, tuned", "no average, tuned", "ours", None),
        ("all-parameter Tent, tuned", "Tent, tuned", "ours", None),
        ("CoTTA, views", "BN-adapt", "ours", None),
    )
    for name, arms in tables.items():
        for ours, other, where, paper in pairs:
            level = {arm: float(np.mean(arms[arm]["error"])) for arm in (other, ours)}
            values = list(np.subtract(arms[other]["error"], arms[ours]["error"]))
            what = f"{name}: gain of {ours} over {other}"
            rows.append(finding(what, values, where=where, unit="points", paper=paper, level=level))
    return rows


def _published(each: Any, data: Path | None, **settings: Any) -> dict[str, Any]:
    """ImageNet-C made on the fly, severity 5, all fifteen corruptions one after the other, never reset."""
    model = from_timm(settings["backbone"], pretrained=True)
    if data is None:
        raise ValueError("data: expected the folder that holds imagenet, one folder of images per class, got None")
    photographs = imagenet_folder(data / "imagenet", limit=settings["limit"])
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    methods: dict[str, Wrap] = {
        "source": lambda net: net,
        "BN-adapt": BNAdapt,
        "Tent": partial(Tent, lr=2.5e-4, optimizer=sgd),
        "CoTTA": lambda net: CoTTA(net, 0.01, 0.999, 0.001, 0.1, symmetric=True, optimizer=sgd),
    }

    def errors(seed: int) -> dict[str, float]:
        table = run_at_scale(methods, model, photographs, ORDERS[0], 5, settings["batch"], seed=seed)
        return {method: float(table[method].mean()) for method in methods}

    found = [each(f"seed {seed}", errors, seed) for seed in settings["seeds"]]
    mean = {method: [row[method] for row in found] for method in methods}
    level = {method: float(np.mean(values)) for method, values in mean.items()}
    where = "public benchmark, ImageNet-C, ResNet-50"
    rows = [
        finding(
            "CoTTA, ImageNet-C: error", mean["CoTTA"], where=where, unit="%", claim="paper", paper=63.1, level=level
        )
    ]
    return {"rows": rows, "arrays": {"error": mean}, "protocol": {"severity": 5, "reset": "never"}}
