"""How much several tasks should share: patterns of VL-Adapter on digits, and on a small vision transformer.

An encoder of three layers knows upright digits. Two tasks with 600 images (turned, inverted) and one with 60 (is a
turned digit even?) come together, drawn in proportion to their data, or alike; then a pair of tasks with opposite
labels. The ``gpu`` size has a ViT-B/16 learn CIFAR-100 with plain and Kronecker bottlenecks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ...data import Split, load
from ..core.injection import inject
from ..core.phm import Rule
from ..vl_adapter import VLAdapter
from ._digit_tasks import METHODS, draw_task, source, start_of, suite_of, token, vl
from ._pieces import Claim, cut_test, judged, protocol_of, records
from .at_scale import LARGE, record_large
from .multitask import EVEN, SUBLAYERS, compare_sharing, conflict, learn, relabelled
from .transfer import shifted

__all__ = [
    "METHODS",
    "MINUTES",
    "NEEDS",
    "PRESETS",
    "draw_task",
    "run",
    "source",
    "start_of",
    "suite_of",
    "token",
    "vl",
]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": [0, 1],
        "lrs": [1e-2],
        "steps": 3,
        "alone_steps": 2,
        "source_steps": 5,
        "wide": {"width 128": {"steps": 2}},
        "vit_train": 40,
        "vit_test": 100,
        "vit_steps": 2,
    },
    "cpu": {
        "seeds": [0, 1, 2, 3, 4, 5, 6, 7],
        "lrs": [3e-3, 1e-2],
        "steps": 250,
        "alone_steps": 150,
        "source_steps": 300,
        "wide": {"width 128": {"steps": 250}, "width 128, batches of 32": {"steps": 300, "batch_size": 32}},
        "vit_train": 800,
        "vit_test": 1000,
        "vit_steps": 100,
    },
    "gpu": {"large": LARGE},
}
MINUTES = {"smoke": 0.1, "cpu": 5, "gpu": 9}
NEEDS = {"gpu": ("cuda", "cifar100")}

LAST = r"blocks\.[23]\.(attn\.proj|mlp\.fc2)"  # the first two blocks are computed once for each image
SMALL_TASK = "Table 1, as notes quote it: NLVR2, VL-BART"
LARGE_TASK = "Table 1, as notes quote it: VQA, VL-BART"
CLAIMS = (
    Claim("small task: single - multiple", "single", "multiple", SMALL_TASK, 4.4, column="even"),
    Claim("large task: single - multiple", "single", "multiple", LARGE_TASK, 0.5, column="turned"),
    Claim("small task: half-shared - multiple", "half-up", "multiple", SMALL_TASK, 1.4, column="even"),
    Claim("small task: half-down - multiple", "half-down", "multiple", column="even"),
    Claim("large task: half-down - single", "half-down", "single", column="turned"),
    Claim("small task: PHM, n = 4 - plain, single", "PHM", "single", column="even"),
    Claim("small task: Hyperformer - multiple", "Hyperformer", "multiple", column="even"),
)
WIDTH = 128  # of the encoder in the other settings
ALIKE_CLAIMS = (Claim("small task, drawn alike: single - multiple", "single", "multiple", column="even"),)


def _wide_claims(setting: str) -> tuple[Claim, ...]:
    """The paper's order again, with a wider encoder."""
    return (
        Claim(f"small task, {setting}: single - multiple", "single", "multiple", SMALL_TASK, 4.4, column="even"),
        Claim(f"large task, {setting}: single - multiple", "single", "multiple", LARGE_TASK, 0.5, column="turned"),
    )


VIT_CLAIMS = (
    Claim("transformer, small task: single - multiple", "single", "multiple", column="even"),
    Claim("transformer, large task: single - multiple", "single", "multiple", column="digits"),
)
BIG: dict[str, Callable[[nn.Module], object]] = {
    "adapter": lambda net: inject(net, VLAdapter, SUBLAYERS),
    "PHM, n = 2": lambda net: inject(net, VLAdapter, SUBLAYERS, phm=2),
    "PHM, n = 4": lambda net: inject(net, VLAdapter, SUBLAYERS, phm=4),
    "Compacter": lambda net: inject(net, VLAdapter, SUBLAYERS, phm=4, rank=1, rule=Rule(4)),
}
BIG_CLAIMS = (
    Claim("ViT-B/16: PHM, n = 2 - plain", "PHM, n = 2", "adapter", SMALL_TASK, -2.5, "below"),
    Claim("ViT-B/16: PHM, n = 4 - plain", "PHM, n = 4", "adapter"),
    Claim("ViT-B/16: Compacter - plain", "Compacter", "adapter"),
)


def run(
    each: Callable[..., Any], *, data: Path | None = None, large: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Encoder and transformer, or the large network.

    Args:
        each: of :func:`peftref.recording.record`.
        data: the reader's folder, for the large network.
        large: settings of the large network.
        settings: of the small ones.
    """
    if large:
        return record_large(each, BIG, BIG_CLAIMS, data, **large)
    runs = pd.DataFrame(sum((each(f"shared: {name}", _sharing, name, settings) for name in METHODS), []))
    two = ("single", "multiple")
    wide = {
        name: pd.DataFrame(sum((each(f"{name}: {way}", _wide, way, name, settings) for way in two), []))
        for name in settings["wide"]
    }
    alike = pd.DataFrame(sum((each(f"drawn alike: {name}", _alike, name, settings) for name in two), []))
    alone = pd.DataFrame(each("each task alone", _alone, settings))
    swapped = pd.DataFrame(each("a pair at odds", _swapped, settings))
    cosines = each("cosines of gradients", _cosines, settings)
    vit = pd.DataFrame(each("transformer", _transformer, settings))
    rows = judged(runs, *CLAIMS)
    for name, table in wide.items():
        rows += judged(table, *_wide_claims(name))
    rows += judged(alike, *ALIKE_CLAIMS) + judged(vit, *VIT_CLAIMS)
    arrays = {
        "sharing": runs.to_dict("list"),
        "wide": {name: table.to_dict("list") for name, table in wide.items()},
        "alike": alike.to_dict("list"),
        "alone": alone.to_dict("list"),
        "swapped": swapped.to_dict("list"),
        "transformer": vit.to_dict("list"),
        "cosines": cosines,
    }
    protocol = protocol_of(load("digits"), transformer=load("mnist5k").sha256, weights="pretrained_vit()")
    return {"rows": rows, "arrays": arrays, "protocol": protocol}


def _sharing(name: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    options = {"seeds": settings["seeds"], "lrs": settings["lrs"], "steps": settings["steps"]}
    start = start_of(source(settings["source_steps"]))
    return records(compare_sharing({name: METHODS[name]}, suite_of(), start=start, **options))


def _wide(way: str, name: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same comparison with an encoder twice as wide, and in one setting with smaller batches."""
    options = {"seeds": settings["seeds"], "lrs": settings["lrs"], **settings["wide"][name]}
    start = start_of(source(settings["source_steps"], WIDTH))
    return records(compare_sharing({way: METHODS[way]}, suite_of(), start=start, **options))


def _alike(name: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images of the small task ten times, so that all tasks are drawn alike."""
    suite = suite_of()
    few = suite["even"].train
    suite["even"] = suite["even"]._replace(train=Split(few.x.repeat(10, 1, 1, 1), few.y.repeat(10)))
    start = start_of(source(settings["source_steps"]))
    rows = []
    for seed in settings["seeds"]:
        found = learn(METHODS[name], suite, lr=1e-2, seed=seed, steps=settings["steps"], start=start)
        rows.append({"method": name, "seed": seed, **found.test})
    return rows


def _alone(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The single adapter on one task only: every image of a batch is its own."""
    suite = suite_of()
    start = start_of(source(settings["source_steps"]))
    rows = []
    for seed in settings["seeds"]:
        for name in ("turned", "even"):
            one = {name: suite[name]}
            found = learn(METHODS["single"], one, lr=1e-2, seed=seed, steps=settings["alone_steps"], start=start)
            rows.append({"task": name, "seed": seed, "accuracy": found.test[name]})
    return rows


def _cosines(settings: Mapping[str, Any]) -> list[Any]:
    """Between the tasks' gradients with respect to the single adapter, early in training, for each seed."""
    suite = suite_of()
    start = start_of(source(settings["source_steps"]))
    steps = min(20, settings["steps"])
    runs = [learn(METHODS["single"], suite, lr=1e-2, seed=s, steps=steps, start=start) for s in settings["seeds"]]
    return [conflict(found, suite).tolist() for found in runs]


def _swapped(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Even and odd with the same images and one head."""
    even = draw_task("even", "turned", 600, 2, EVEN)
    odds = {"even": even, "odd": relabelled(even, (1, 0), "odd")}
    start = start_of(source(settings["source_steps"]))
    rivals = {name: METHODS[name] for name in ("single", "multiple", "half-up", "half-down")}
    rivals["single + token"] = token
    rows = []
    for name, build in rivals.items():
        for seed in settings["seeds"]:
            steps = settings["alone_steps"]
            found = learn(build, odds, lr=1e-2, seed=seed, steps=steps, common_head=True, start=start)
            cosine = conflict(found, odds)[0, 1].item()
            both = {"sum": sum(found.test.values()), "cosine": cosine}
            rows.append({"method": name, "seed": seed, **found.test, **both})
    return rows


def _transformer(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    n = settings["vit_train"]
    suite = {
        "digits": shifted("digits", n),
        "turned": shifted("rotated", n),
        "even": relabelled(shifted("digits", n // 10, seed=1), EVEN, "even"),
    }
    suite = {name: cut_test(task, settings["vit_test"]) for name, task in suite.items()}
    methods = {"single": vl(LAST), "multiple": vl(LAST, sharing="multiple")}
    return records(compare_sharing(methods, suite, lrs=(1e-2,), seeds=settings["seeds"], steps=settings["vit_steps"]))
