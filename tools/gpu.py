"""All that needs a GPU, within a time limit: the tests marked ``cuda``, then the ``gpu`` size of every experiment.

The shortest experiment comes first. Each result is kept as soon as it is there, in ``peftref/recorded``, and copied to
the folder in the environment variable OUT, if there is one. An experiment whose data are not there, or for which no
time is left, is named and left out; one that is stopped by the limit goes on where it was at the next call::

    python -m tools.gpu --minutes 9 --data ~/datasets

Without CUDA it says so and ends with 2.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peftref._records import FOLDER, file_name
from peftref.recording import experiment, experiments, lacking

ROOT = Path(__file__).resolve().parents[1]
PRESET = "gpu"


def jobs() -> list[tuple[float, str]]:
    """Minutes and name of every experiment with a size for a GPU, the shortest first."""
    found = [(experiment(name), name) for name in experiments()]
    return sorted((module.MINUTES[PRESET], name) for module, name in found if PRESET in module.PRESETS)


def command(arguments: list[str], seconds: float) -> int | None:
    """Run a Python module of this tree; its exit status, or None if it was stopped because the time was over."""
    try:
        return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, timeout=max(seconds, 1)).returncode
    except subprocess.TimeoutExpired:
        return None


def keep(name: str, out: str | None, folder: Path = FOLDER) -> None:
    """Copy the record of an experiment, and what an interrupted run has left, to another folder."""
    partial = folder / f".{name.replace('/', '-')}-{PRESET}.partial.json"
    for path in (folder / file_name(name), partial):
        if out and path.is_file():
            Path(out).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, Path(out) / path.name.lstrip("."))


def main(arguments: list[str], run: Callable[[list[str], float], int | None] = command) -> int:
    """Tests, then experiments; 0 if all that was begun went well, 1 if not, 2 without CUDA."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description="All that needs a GPU.")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit")
    parser.add_argument("--data", help="folder of the data sets")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tools.gpu: expected a machine with CUDA, got none; nothing was run", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * given.minutes
    code = run(["pytest", "-q", "-m", "cuda", "tests"], end - time.monotonic())
    fine = code in (0, 5)  # 5: no test is marked
    print(f"tests marked cuda: {'passed' if fine else 'failed' if code is not None else 'stopped, the time is over'}")
    for minutes, name in jobs():
        left = (end - time.monotonic()) / 60
        problem = lacking(name, PRESET, given.data)
        if problem is not None or minutes > left:
            print(f"{name}: left out; {problem or f'it takes about {minutes:g} minutes, and {left:.1f} are left'}")
            continue
        more = [] if given.data is None else ["--data", given.data]
        code = run(["tools.record", name, PRESET, *more], 60 * left)
        keep(name, os.environ.get("OUT"))
        print(f"{name}: {'stopped, the time is over' if code is None else 'recorded' if code == 0 else 'failed'}")
        fine = fine and code == 0
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
