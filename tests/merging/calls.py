"""A valid call of everything public in peftref.merging: tests.frame.test_fuzz spoils its arguments one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftref import data, merging
from tests.frame._inputs import Call, cnn, gen, labels, mlp, normed, rows_split, t


def states() -> tuple[dict[str, Tensor], ...]:
    return tuple({"w": t(6, 4, seed=s), "b": t(4, seed=s + 9)} for s in range(3))


def patch() -> dict[str, Tensor]:
    return merging.signature(*states(), ["w"])


def quantised() -> merging.Quantised:
    return merging.quantise({"w": t(6, 4)}, 16)


def calls_merged(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule is checked when it is made, or when it first meets tensors."""
    w0, w1, w2 = states()
    return lambda **arguments: merging.merge(w0, [w1, w2], rule(**arguments))


CALLS: dict[str, Callable[[], Call]] = {
    "average": lambda: (calls_merged(merging.average), {}),
    "dare": lambda: (
        calls_merged(merging.dare),
        dict(drop=0.5, then=merging.task_arithmetic(), seed=0),
    ),
    "fisher_wise_ft": lambda: (
        (
            lambda alpha, fisher0, fisher1, floor: merging.merge(
                states()[0], [states()[1]], merging.fisher_wise_ft(alpha, fisher0, fisher1, floor)
            )
        ),
        dict(
            alpha=0.5,
            fisher0={k: v.abs() for k, v in states()[0].items()},
            fisher1={k: v.abs() for k, v in states()[1].items()},
            floor=1e-6,
        ),
    ),
    "linear": lambda: (calls_merged(merging.linear), dict(weights=[0.5, 0.5])),
    "task_arithmetic": lambda: (calls_merged(merging.task_arithmetic), dict(scale=0.3)),
    "wise_ft": lambda: (
        (lambda alpha: merging.merge(states()[0], [states()[1]], merging.wise_ft(alpha))),
        dict(alpha=0.5),
    ),
    "bang_loss": lambda: (
        merging.bang_loss,
        dict(model=mlp(), x=t(8, 6), y=labels(), smoothing=0.1, mixing=0.5, generator=gen()),
    ),
    "calibration_error": lambda: (merging.calibration_error, dict(probs=t(8, 4).softmax(1), y=labels(), bins=5)),
    "confidence": lambda: (merging.confidence, dict(probs=t(8, 4).softmax(1))),
    "fine_tune": lambda: (
        merging.fine_tune,
        dict(
            model=mlp(),
            x=t(8, 6),
            y=labels(),
            smoothing=0.1,
            mixing=0.5,
            epochs=1,
            lr=0.01,
            batch_size=4,
            weight_decay=0.0,
            seed=0,
        ),
    ),
    "mixup": lambda: (
        merging.mixup,
        dict(x=t(8, 6), targets=t(8, 4).softmax(1), mixing=0.5, generator=gen(), nu=0.5),
    ),
    "outcomes": lambda: (
        merging.outcomes,
        dict(y=labels(), first=labels(), second=labels().flip(0), average=labels()),
    ),
    "smooth": lambda: (merging.smooth, dict(targets=t(8, 4).softmax(1), smoothing=0.1)),
    "soft_cross_entropy": lambda: (merging.soft_cross_entropy, dict(logits=t(8, 4), targets=t(8, 4).softmax(1))),
    "batchnorms": lambda: (merging.batchnorms, dict(model=normed())),
    "recalibrate": lambda: (merging.recalibrate, dict(model=normed(), batches=[t(8, 6)])),
    "ColourNets": lambda: (merging.ColourNets, dict(seeds=[0, 1], hidden=4)),
    "ColourNets.forward": lambda: (merging.ColourNets([0, 1], 4), dict(x=t(5, 2, 292))),
    "distinct": lambda: (merging.distinct, dict(x=t(5, 3, 42, 42))),
    "hits": lambda: (merging.hits, dict(outputs=t(8, 2, 10), y=labels())),
    "train": lambda: (
        merging.train,
        dict(
            nets=merging.ColourNets([0, 1], 4),
            x=t(8, 2, 292),
            y=labels(),
            steps=2,
            smoothing=0.1,
            mixing=0.5,
            lr=0.01,
            batch_size=4,
            seed=0,
            snapshots=(1,),
        ),
    ),
    "scenes": lambda: (
        merging.scenes,
        dict(
            split=data.Split(torch.rand(4, 1, 28, 28, generator=gen()), labels(4)),
            p=0.5,
            seeds=[0],
            lower=0.2,
            colours=32,
        ),
    ),
    "delta": lambda: (merging.delta, dict(state=states()[0], base=states()[1], names=["w"])),
    "elementwise": lambda: (merging.elementwise, dict(rule=merging.average())),
    "fill": lambda: (
        merging.fill,
        dict(
            base=states()[0],
            models=list(states()[1:]),
            rule=merging.average(),
            place=lambda name, like: torch.empty_like(like),
        ),
    ),
    "merge": lambda: (
        merging.merge,
        dict(base=states()[0], models=list(states()[1:]), rule=merging.average(), skip=["b"]),
    ),
    "upcast": lambda: (merging.upcast, dict(t=t(3))),
    "Corrupting": lambda: (merging.Corrupting, dict(model=nn.Identity(), name="contrast", seed=0)),
    "Corrupting.forward": lambda: (
        merging.Corrupting(nn.Identity(), "contrast"),
        dict(x=torch.rand(3, 1, 28, 28, generator=gen())),
    ),
    "accuracy": lambda: (merging.accuracy, dict(model=mlp(), state=mlp().state_dict(), data=rows_split())),
    "corrupted": lambda: (
        merging.corrupted,
        dict(data=data.Split(torch.rand(4, 1, 28, 28, generator=gen()), labels(4)), name="contrast", seed=0),
    ),
    "first": lambda: (merging.first, dict(units=[["a"], ["b", "c"]], k=1)),
    "units": lambda: (merging.units, dict(model=cnn())),
    "Patched": lambda: (merging.Patched, dict(model=mlp(), patch={"0.weight": t(8, 6)})),
    "Patched.on": lambda: (merging.Patched(mlp(), {"0.weight": t(8, 6)}).on, dict(strength=0.5)),
    "apply": lambda: (merging.apply, dict(host=states()[0], patch=patch())),
    "quantise": lambda: (merging.quantise, dict(signature={"w": t(6, 4)}, levels=16)),
    "Quantised.dequantise": lambda: (quantised().dequantise, {}),
    "average_batchnorm": lambda: (merging.average_batchnorm, dict(model=normed(), robust=[normed().state_dict()])),
    "blend_statistics": lambda: (merging.blend_statistics, dict(model=normed(), batches=[t(8, 6)], strength=1.0)),
    "compose": lambda: (merging.compose, dict(signatures=[patch(), patch()], weights=[1.0, 2.0], strength=1.0)),
    "signature": lambda: (
        merging.signature,
        dict(pretrained=states()[0], clean=states()[1], robust=states()[2], names=["w"]),
    ),
    "spurious_accuracy": lambda: (merging.spurious_accuracy, dict(x=1.0, p=0.5, classes=3)),
    "imbalance_gain": lambda: (merging.imbalance_gain, dict(scale=2.0)),
    "margin_ose": lambda: (merging.margin_ose, dict(p=0.5, n_v=2, n_s=3, n_v2=2, n_s2=3, scale=1.0)),
    "margin_single": lambda: (merging.margin_single, dict(p=0.5, n_v=2, n_s=3)),
    "margin_wse": lambda: (
        merging.margin_wse,
        dict(p=0.5, n_v=2, n_s=3, n_v2=2, n_s2=3, scale=1.0, feature_scale=1.0),
    ),
    "simulate": lambda: (
        merging.simulate,
        dict(p=0.5, n_v=2, n_s=3, classes=3, generator=gen(), scale=1.0, feature_scale=1.0, draws=100, noise=1e-6),
    ),
    "ties": lambda: (calls_merged(merging.ties), dict(density=0.5, scale=1.0, weights=[1.0, 2.0], elect="mass")),
    "trim_thresholds": lambda: (
        merging.trim_thresholds,
        dict(base=states()[0], models=list(states()[1:]), density=0.5),
    ),
    "colour_maps": lambda: (merging.colour_maps, dict(generator=gen(), colours=32)),
    "multicolor": lambda: (
        merging.multicolor,
        dict(x=torch.rand(4, 1, 28, 28, generator=gen()), y=labels(4), p=0.5, generator=gen(), colours=32),
    ),
}


# Lines of mathematics whose docstring gives the shapes: torch names the sizes that do not fit.
KERNELS = {
    "ColourNets.forward",
    "accuracy",
    "distinct",
    "hits",
    "train",
}


# Names without a row, and why.
NAMELESS = {
    "Checkpoint": "files, see merging/test_checkpoints",
    "merge_checkpoints": "files, see merging/test_checkpoints",
    "deal": "the shipped data",
    "family": "the shipped weights",
}
