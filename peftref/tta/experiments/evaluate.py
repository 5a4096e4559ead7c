r"""The online protocol: every method meets the same stream once, and is scored on the answers it gives on the way.

For visits :math:`c` to a domain with :math:`n_c` images, error :math:`e_c = 100\,(1 - \text{correct}_c/n_c)`; the mean
error is the plain mean over visits (eq-tta-error),

.. math:: \bar e = \tfrac1C\sum_c e_c ,

not weighted by :math:`n_c`. Labels reach the metric only, never the method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from torch import Tensor, nn

from ..._checks import class_scores
from ...data.streams import Stream

__all__ = [
    "Run",
    "drift",
    "error_by_domain",
    "mean_error",
    "mean_recall",
    "run",
    "run_seeds",
    "running_error",
    "summary",
]


class Run(NamedTuple):
    """What one method did on one stream.

    Attributes:
        batches: one row per batch: ``segment``, ``domain`` and ``severity`` (of its first image), ``n``, ``wrong``,
            ``seconds``, and what ``observe`` returned.
        predictions: predicted classes in stream order, ``(N,)``.
        labels: true classes, ``(N,)``.
        domains: name of the domain of every image, ``(N,)``; a batch of a mixed stream holds several.
    """

    batches: pd.DataFrame
    predictions: Tensor
    labels: Tensor
    domains: NDArray[Any]


def run(
    method: nn.Module,
    stream: Stream,
    *,
    reset: str = "first",
    observe: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> Run:
    """Predict a whole stream online.

    Args:
        method: takes a batch, returns logits ``(B, K)``; adapts on the way if it is that kind. A plain classifier is
            used in eval mode. A method that needs more than one sample has an attribute ``smallest``.
        stream: iterated once; its labels are only compared with.
        reset: ``"first"``: before the first batch only (continual); ``"segment"``: before every segment.
        observe: called after each batch, returns further columns, e.g. :func:`drift`.

    Raises:
        TypeError: a method that returns no tensor.
        ValueError: an unknown ``reset``, a batch that is too small for the method (both before anything runs), or
            other than logits ``(B, K)``.
    """
    if reset not in ("first", "segment"):
        raise ValueError(f"reset: expected 'first' or 'segment', got {reset!r}")
    needed = getattr(method, "smallest", 1)
    if (least := min(len(batch.y) for batch in stream)) < needed:
        raise ValueError(f"stream: expected batches of at least {needed} samples for this method, got one of {least}")
    restart = getattr(method, "reset", lambda: None)
    restart()
    method.eval()
    rows = []
    predictions = []
    for segment, part in enumerate(stream.segments()):
        if reset == "segment" and segment:
            restart()
        for batch in part:
            start = time.perf_counter()
            with torch.no_grad():  # methods that learn switch gradients on themselves
                predicted = class_scores("method", method(batch.x), len(batch.y)).argmax(-1)
            wrong = int((predicted != batch.y).sum())  # waits for the device: only now is the answer there
            seconds = time.perf_counter() - start
            predictions.append(predicted)
            rows.append(
                {
                    "segment": segment,
                    "domain": stream.names[int(batch.domain[0])],
                    "severity": int(batch.severity[0]),
                    "n": len(batch.y),
                    "wrong": wrong,
                    "seconds": seconds,
                    **(observe(method) if observe else {}),
                }
            )
    domains = np.array(stream.names)[stream.domain.cpu().numpy()]
    return Run(pd.DataFrame(rows), torch.cat(predictions), stream.y, domains)


def run_seeds(
    methods: Mapping[str, Callable[[nn.Module], nn.Module]],
    models: Sequence[nn.Module],
    streams: Sequence[Stream],
    *,
    n_jobs: int = 2,
    **options: Any,
) -> dict[str, list[Run]]:
    """Every method on every seed, in parallel processes of one thread each: small networks run fastest so.

    Args:
        methods: name -> function that wraps a source model, e.g. ``{"Tent": lambda m: Tent(m, lr=1e-3)}``.
        models: source model of each seed.
        streams: stream of each seed.
        n_jobs: processes; under ``joblib.parallel_config`` the same call spreads over a cluster.
        options: passed to :func:`run`.

    Returns:
        Method -> one :class:`Run` per seed.
    """
    if not methods or not 0 < len(models) == len(streams):
        sizes = f"{len(methods)}, {len(models)} and {len(streams)}"
        raise ValueError(f"methods, models, streams: expected some, and a stream for each model, got {sizes}")
    pairs = list(zip(models, streams, strict=True))
    jobs = (delayed(_one)(wrap, model, stream, options) for wrap in methods.values() for model, stream in pairs)
    runs = Parallel(n_jobs)(jobs)
    return {name: runs[i * len(pairs) : (i + 1) * len(pairs)] for i, name in enumerate(methods)}


def _one(wrap: Callable[[nn.Module], nn.Module], model: nn.Module, stream: Stream, options: dict[str, Any]) -> Run:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(wrap(model), stream, **options)
    finally:
        torch.set_num_threads(threads)


def error_by_domain(result: Run) -> pd.Series:
    """Error in % of each domain, in order of first appearance."""
    wrong = pd.Series((result.predictions != result.labels).cpu().numpy(), name="error")
    return 100 * wrong.groupby(pd.Series(result.domains, name="domain"), sort=False).mean()


def mean_error(result: Run) -> float:
    """Plain mean in % over segments: each visit to a domain counts once."""
    total = result.batches.groupby("segment", sort=False)[["wrong", "n"]].sum()
    return float((100 * total.wrong / total.n).mean())  # eq-tta-error


def running_error(result: Run, window: int = 10) -> NDArray[Any]:
    """Error in % over the last ``window`` batches, one value per batch."""
    if window < 1:
        raise ValueError(f"window: expected at least 1 batch, got {window!r}")
    rolling = result.batches[["wrong", "n"]].rolling(window, min_periods=1).sum()
    return (100 * rolling.wrong / rolling.n).to_numpy()


def mean_recall(result: Run, num_classes: int) -> float:
    """Mean over the classes that occur of the per-class accuracy, in %: the metric under a shift of the prior."""
    if num_classes <= int(result.labels.max()):
        raise ValueError(f"num_classes: expected more than the largest label, {result.labels.max()}, got {num_classes}")
    hits = torch.bincount(result.labels[result.predictions == result.labels], minlength=num_classes)
    seen = torch.bincount(result.labels, minlength=num_classes)
    return float(100 * (hits[seen > 0] / seen[seen > 0]).mean())


def drift(method: nn.Module, model: str = "student") -> dict[str, float]:
    r"""Distance of the adapted network from its source, :math:`\|\theta_t-\theta_0\|_2`; for ``observe``."""
    pairs = zip(getattr(method, model).parameters(), method.get_submodule("source").parameters(), strict=True)
    return {"drift": float(torch.stack([(p - q).detach().float().norm() for p, q in pairs]).norm())}


def summary(runs: Mapping[str, Sequence[Run]], value: Callable[[Run], float] = mean_error) -> pd.DataFrame:
    """Mean and standard deviation over seeds of ``value``: one row per method."""
    table = pd.DataFrame({name: [value(r) for r in seeds] for name, seeds in runs.items()}).T
    return pd.DataFrame({"mean": table.mean(axis=1), "std": table.std(axis=1, ddof=1)})
