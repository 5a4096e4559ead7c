"""What all benchmarks share: two callables timed in turn, the peak of their tensor memory, one row of results.

A benchmark module ``bench_<slug>.py`` has a function ``rows() -> list[Row]``. For each row it builds the inputs,
checks that both sides give the same result, and calls :func:`compare`.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TypedDict

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Row", "compare", "environment", "peak_mb"]


class Row(TypedDict):
    claim: str
    peer: str
    ours_s: float  # median seconds
    peer_s: float
    ratio: float  # peer / ours: above 1 we are faster
    ours_peak_mb: float
    peer_peak_mb: float
    target: float | None  # the ratio promised, where one is


def compare(
    claim: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    peer_name: str,
    target: float | None = None,
    warmup: int = 2,
    repeats: int = 7,
) -> Row:
    """Time ``ours`` and ``peer`` alternately, so that a busy machine slows both; medians, their ratio, peak memory."""
    for _ in range(warmup):
        ours(), peer()
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    try:
        for _ in range(repeats):
            for run, seconds in zip((ours, peer), times, strict=True):
                start = time.perf_counter()
                run()
                _synchronise()
                seconds.append(time.perf_counter() - start)
    finally:
        gc.enable()
    ours_s, peer_s = map(statistics.median, times)
    return Row(
        claim=claim, peer=peer_name, ours_s=ours_s, peer_s=peer_s, ratio=peer_s / ours_s,
        ours_peak_mb=peak_mb(ours), peer_peak_mb=peak_mb(peer), target=target,
    )  # fmt: skip


def peak_mb(run: Callable[[], object]) -> float:
    """Highest sum of tensor memory that ``run`` holds at a time beyond what existed before, in 10^6 bytes.

    Counted from the allocations torch records, temporaries inside operations included: exact and repeatable, where the
    resident size of the process would depend on what the allocator kept from earlier runs.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    on_cpu = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.device_type().name == "CPU"]
    peak = max(accumulate(on_cpu), default=0)
    if torch.cuda.is_available():
        peak += torch.cuda.max_memory_allocated() - before
    del result
    return peak / 1e6


def environment() -> dict[str, str | int]:
    """Versions and machine: what a stored ratio must be read with."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor() or platform.machine()
