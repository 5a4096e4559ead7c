"""What all benchmarks share: two callables timed in turn, the peak of their tensor memory, one row of results.

A benchmark module ``bench_<slug>.py`` has a function ``rows() -> list[Row]``. For each row it builds the inputs,
checks that both sides give the same result, and calls :func:`compare`. Where the bytes or operations that no
implementation avoids can be counted, :func:`bytes_floor` or :func:`flops_floor` says how long they alone take. (Bytes
that stay in the processor's caches are none of those: only large inputs have a floor in bytes.)
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import TypedDict

import torch
from threadpoolctl import threadpool_limits
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from peftref.recording import hardware

__all__ = [
    "Floor",
    "Row",
    "bytes_floor",
    "compare",
    "counted_flops",
    "environment",
    "flops_floor",
    "one_thread",
    "peak_mb",
]


class Floor(TypedDict):
    seconds: float
    what: str  # is counted, in a word or two


class Row(TypedDict):
    claim: str
    peer: str
    ours_s: float  # median seconds
    peer_s: float
    ratio: float  # peer / ours: above 1 we are faster
    threads: int  # of torch, while both ran
    ours_peak_mb: float
    peer_peak_mb: float
    target: float | None  # the ratio promised, where one is
    floor: Floor | None  # what no implementation can go below on this machine, where that can be counted


def compare(
    claim: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    peer_name: str,
    target: float | None = None,
    floor: Floor | None = None,
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
        threads=torch.get_num_threads(),
        ours_peak_mb=peak_mb(ours), peer_peak_mb=peak_mb(peer), target=target, floor=floor,
    )  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch and the libraries below NumPy on one thread: more, sharing small work, would be timed waiting."""
    threads = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


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


def bytes_floor(n_bytes: float) -> Floor:
    """The time in which this machine reads and writes so many bytes, all together, when it copies a large tensor."""
    return Floor(seconds=n_bytes / _copied_bytes(torch.get_num_threads()), what=f"{n_bytes / 1e6:.0f} MB")


def flops_floor(flops: float, dtype: torch.dtype = torch.float32) -> Floor:
    """The time of so many additions and multiplications, at the speed of one large product of matrices."""
    return Floor(seconds=flops / _multiplied_flops(torch.get_num_threads(), dtype), what=f"{flops / 1e9:.3g} GFLOP")


def counted_flops(run: Callable[[], object]) -> int:
    """Additions and multiplications of the products and convolutions in ``run``, backward pass included.

    On a CPU torch does not count those inside fused attention: what is found is the less, and still a floor.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@cache
def _copied_bytes(threads: int) -> float:
    """Bytes per second with the threads that torch uses now: of 256 MB, each is read once and written once."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source).copy_(source)  # the pages are there before the clock starts
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


@cache
def _multiplied_flops(threads: int, dtype: torch.dtype) -> float:
    a = torch.ones(1536, 1536, dtype=dtype)
    return 2 * len(a) ** 3 / _best(lambda: a @ a)


def _best(run: Callable[[], object], repeats: int = 9) -> float:
    """The shortest time: a floor is what the machine can do, not what it did while something else ran."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def environment() -> dict[str, str | int]:
    """Versions and machine: what a stored ratio must be read with."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count() or 1,
        **hardware(),
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
