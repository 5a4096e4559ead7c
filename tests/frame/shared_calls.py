"""A valid call of everything public in the modules that belong to no package; keys are ``"<module>.<Name>"``."""

from __future__ import annotations

from collections.abc import Callable

from peftref import at_scale, fitting, results
from tests.frame._inputs import Call, cnn, gen, labels, listing, mlp, pictures, rows_split, t

CALLS: dict[str, Callable[[], Call]] = {
    "at_scale.Resized": lambda: (
        at_scale.Resized,
        dict(model=mlp(), size=16),
    ),
    "at_scale.first_of_each": lambda: (at_scale.first_of_each, dict(y=labels(), count=1)),
    "at_scale.random_crop": lambda: (at_scale.random_crop, dict(x=pictures(), size=8, generator=gen(), smallest=0.1)),
    "at_scale.shifted_crop": lambda: (at_scale.shifted_crop, dict(x=pictures(), generator=gen(), pad=4)),
    "fitting.accuracy": lambda: (fitting.accuracy, dict(logits=t(8, 4), y=labels())),
    "fitting.batches": lambda: (
        listing(fitting.batches),
        dict(split=rows_split(), batch_size=4, epochs=1, generator=gen()),
    ),
    "fitting.best_rate": lambda: (
        fitting.best_rate,
        dict(lrs=(0.1, 0.2, 0.3), score=lambda lr: (-abs(lr - 0.2),)),
    ),
    "fitting.check_batches": lambda: (fitting.check_batches, dict(batch_size=4, epochs=1)),
    "fitting.fit": lambda: (
        fitting.fit,
        dict(model=cnn(), x=t(8, 1, 28, 28), y=labels(), epochs=1, lr=0.01, batch_size=4, seed=0),
    ),
    "fitting.predict": lambda: (fitting.predict, dict(model=mlp(), x=t(8, 6), batch_size=4)),
    "fitting.train": lambda: (
        fitting.train,
        dict(model=mlp(), x=t(8, 6), y=labels(), lr=0.01, steps=2, batch_size=4, clip=1.0),
    ),
    "results.finding": lambda: (
        results.finding,
        dict(what="a gain", values=[1.0, 2.0], where="Table 1", unit="points", claim="above", against=0.0),
    ),
    "results.judge": lambda: (results.judge, dict(values=[1.0, 2.0], claim="above", against=0.0)),
}

# Lines of mathematics whose docstring gives the shapes: torch names the sizes that do not fit.
KERNELS = {"at_scale.first_of_each", "at_scale.random_crop", "at_scale.shifted_crop", "fitting.train"}

# Cases that stay as they are, and why.
SPARED = {
    ("at_scale.random_crop", "x", "text"): "a text is taken for a device",
    ("fitting.fit", "y", "beyond"): "only a pass tells how many classes there are; the first one fails",
    ("fitting.fit", "x", "meta"): "the first pass fails",
}

# Names without a row, and why.
NAMELESS = {
    "optim.ForeachOptimizer": "abstract, see test_optim",
    "results.interval": "judge's checks, see test_results",
    "at_scale.pick_device": "torch's own argument",
    "at_scale.protocol": "any settings",
    "fitting.minimise": "by train, adapt and compare",
    "recording.hardware": "no input",
    "recording.record": "files, see test_records",
    "recording.run": "no input",
    "results.glue": "pages, see test_records",
    "results.recorded": "files, see test_records",
}

# Modules without a row, and why.
APART = {
    "plots": "figures, see test_plots and its neighbours",
    "catalog": "the book's own table, which takes no input",
    "widgets": "pages, see test_widgets",
}
