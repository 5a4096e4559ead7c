"""A valid call of everything public in peftref.tta: tests.frame.test_fuzz spoils its arguments one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peftref import tta
from tests.frame._inputs import Call, gen, mlp, normed, pictures, stream, t, toy


def run_of() -> tta.Run:
    return tta.run(mlp(), stream())


CALLS: dict[str, Callable[[], Call]] = {
    "BNAdapt": lambda: (tta.BNAdapt, dict(model=normed(), alpha=0.5)),
    "BNAdapt.forward": lambda: (tta.BNAdapt(normed(), 0.5), dict(x=t(8, 6))),
    "CoTTA": lambda: (
        tta.CoTTA,
        dict(model=normed(), lr=0.001, momentum=0.99, restore_p=0.1, threshold=0.9, n_views=2, steps=1, seed=0),
    ),
    "CoTTA.forward": lambda: (  # SGD: Adam's first step is the sign of a gradient, even of rounding
        tta.CoTTA(normed(), n_views=2, views=lambda x: x, optimizer=torch.optim.SGD),
        dict(x=t(8, 6)),
    ),
    "confidence": lambda: (tta.confidence, dict(logits=t(8, 4))),
    "consistency_loss": lambda: (tta.consistency_loss, dict(student=t(8, 4), target=t(8, 4).softmax(1))),
    "ema": lambda: (tta.ema, dict(teacher=[t(3)], student=[t(3, seed=1)], momentum=0.9)),
    "restoration_mask": lambda: (tta.restoration_mask, dict(params=[t(3)], p=0.5, generator=gen())),
    "restore": lambda: (tta.restore, dict(params=[t(3)], source=[t(3, seed=1)], p=0.5, generator=gen())),
    "drift": lambda: (tta.drift, dict(method=tta.Tent(normed()), model="model")),
    "error_by_domain": lambda: (tta.error_by_domain, dict(result=run_of())),
    "mean_error": lambda: (tta.mean_error, dict(result=run_of())),
    "mean_recall": lambda: (tta.mean_recall, dict(result=run_of(), num_classes=4)),
    "run": lambda: (tta.run, dict(method=tta.Tent(normed()), stream=stream(), reset="first")),
    "running_error": lambda: (tta.running_error, dict(result=run_of(), window=2)),
    "run_seeds": lambda: (
        tta.run_seeds,
        dict(methods={"tent": tta.Tent}, models=[normed()], streams=[stream()], n_jobs=1),
    ),
    "summary": lambda: (tta.summary, dict(runs={"tent": [run_of()]})),
    "LAME": lambda: (tta.LAME, dict(model=toy(), kind="knn", k=2, strength=1.0, max_iterations=10)),
    "LAME.forward": lambda: (tta.LAME(toy(), k=2, head="head"), dict(x=t(8, 6))),
    "affinity": lambda: (tta.affinity, dict(features=t(8, 5), kind="knn", k=2)),
    "energy": lambda: (
        tta.energy,
        dict(z=t(8, 4).softmax(1), log_probs=t(8, 4).log_softmax(1), affinity=tta.affinity(t(8, 5), k=2), strength=1.0),
    ),
    "laplacian_assign": lambda: (
        tta.laplacian_assign,
        dict(
            log_probs=t(8, 4).log_softmax(1),
            affinity=tta.affinity(t(8, 5), k=2),
            strength=1.0,
            floor=0.0,
            max_iterations=10,
            tolerance=1e-8,
        ),
    ),
    "vote_update": lambda: (
        tta.vote_update,
        dict(log_q=t(8, 4).log_softmax(1), affinity=tta.affinity(t(8, 5), k=2), z=t(8, 4).softmax(1), strength=1.0),
    ),
    "Tent": lambda: (tta.Tent, dict(model=normed(), lr=0.001)),
    "Tent.forward": lambda: (tta.Tent(normed(), optimizer=torch.optim.SGD), dict(x=t(8, 6))),
    "entropy": lambda: (tta.entropy, dict(logits=t(8, 4))),
    "RandomViews": lambda: (tta.RandomViews, dict(seed=0)),
    "RandomViews.__call__": lambda: (tta.RandomViews(0), dict(x=pictures())),
    "RandomViews.check": lambda: (tta.RandomViews(0).check, dict(x=pictures())),
    "apply_view": lambda: (tta.apply_view, dict(x=pictures(), view=tta.View(brightness=1.1, angle=3.0))),
    "draw_view": lambda: (tta.draw_view, dict(size=(16, 16), generator=gen())),
}


# Lines of mathematics whose docstring gives the shapes: torch names the sizes that do not fit.
KERNELS = {
    "confidence",
    "consistency_loss",
    "ema",
    "energy",
    "vote_update",
    "restoration_mask",
    "restore",
}


# Cases that stay as they are, and why.
SPARED = {
    ("restoration_mask", "params", "empty sequence"): "nothing at this place",
    ("run_seeds", "n_jobs", "-1"): "starts a process for each core",
    ("run_seeds", "n_jobs", "0"): "joblib says so",
}


# Names without a row, and why.
NAMELESS = {
    name: "called by a method alone, with the model that it checked"
    for name in (
        "Adapted",
        "Learning",
        "adapting",
        "batch_norms",
        "check_called",
        "freeze",
        "gradient_step",
        "norm_affine",
        "own_copy",
        "use_batch_statistics",
    )
}
