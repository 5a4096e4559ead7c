"""Running an experiment: its settings, its progress, what an interruption leaves; see :mod:`peftref.results`."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import __version__
from ._checks import one_of
from ._experiments import experiment, experiments, lacking, stamp
from ._records import FOLDER, SCHEMA, Record, checked, file_name, plain, read
from ._replacing import replace_text

__all__ = ["experiment", "experiments", "hardware", "lacking", "record", "run"]

SIZES = ("smoke", "cpu", "t4", "gpu")


def record(
    name: str,
    preset: str = "cpu",
    *,
    data: str | Path | None = None,
    folder: str | Path | None = None,
    resume: bool = True,
    write: bool = False,
) -> Record:
    """Run an experiment: say how long it takes, show how far it is, go on where an earlier run was interrupted.

    A run goes on only with pieces of the same settings, made by the same experiment and the same module of the method
    (comments and docstrings aside); others are kept in a file that ends in ``.old``.

    Args:
        name: part and method, ``"tta/lame"``.
        preset: which size.
        data: the reader's folder of data sets, for the sizes that need one.
        folder: of the records; the package's own if not given. What is unfinished lies there too, or in the current
            folder if nothing is to be written.
        resume: False begins anew.
        write: keep the result as the record of this preset.

    Raises:
        ValueError: an unknown name or preset, something the preset needs is missing, or a damaged file of an earlier
            run or record; nothing has run then.
    """
    module = experiment(name)
    one_of("preset", preset, list(module.PRESETS))
    problem = lacking(name, preset, data)
    if problem:
        raise ValueError(problem)
    before = read(name, folder, missing_ok=True)
    settings = dict(module.PRESETS[preset])
    place = Path(folder or FOLDER) if write else Path.cwd()
    pieces = before[preset].run.get("pieces") if preset in before else None
    code = _loaded_code()
    each = _Pieces(place / f".{name.replace('/', '-')}-{preset}.partial.json", stamp(name, settings), resume, pieces)
    print(f"{name}, {preset}: about {module.MINUTES[preset]:g} minutes", flush=True)
    with each:
        found = module.run(each, data=None if data is None else Path(data), **settings)
    done = Record(
        name=name,
        preset=preset,
        rows=list(found["rows"]),
        arrays=_gaps(plain(found.get("arrays", {}))),
        protocol=plain({**settings, **found.get("protocol", {})}),
        run={**run(), **each.cost(), "pieces": len(each.found), "code": code},
    )
    _text(name, {preset: checked(done)})  # whatever cannot be written is noticed here, with all pieces kept
    if write:
        newest = read(name, folder, missing_ok=True)  # another size may have been recorded meanwhile
        replace_text(place / file_name(name), _text(name, {**newest, preset: done}))
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
    found = {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "peftref": __version__},
        "date": datetime.date.today().isoformat(),
        "seconds": round(_processor_seconds()),
        "peak_mb": round(peak / 1e6),
    }
    if torch.cuda.is_available():
        found["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    return found


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

    def __init__(self, path: Path, stamp: str, resume: bool, total: int | None) -> None:
        self.path = path
        self.stamp = stamp
        self.total = total
        self.found: dict[str, Any] = {}
        self.earlier = {"seconds": 0.0, "wall_seconds": 0.0}
        if path.is_file():
            stored = _partial(path)
            if resume and stored["stamp"] == stamp:
                self.found = stored["found"]
                self.earlier = stored["cost"]
            else:  # of other code or settings: kept, but not used
                path.replace(path.with_suffix(".old"))

    def __enter__(self) -> _Pieces:
        from tqdm.auto import tqdm

        self.start = {"seconds": _processor_seconds(), "wall_seconds": time.monotonic()}
        self.bar = tqdm(unit="piece", initial=len(self.found), total=self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if kind is not None and self.found:
            print(f"{len(self.found)} pieces are kept in {self.path}; the same call goes on there", file=sys.stderr)

    def __call__(self, key: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if key not in self.found:
            self.bar.set_postfix_str(key)
            found = plain(function(*args, **options))
            try:
                text = json.dumps({"stamp": self.stamp, "cost": self.cost(), "found": {**self.found, key: found}})
            except TypeError as error:
                raise TypeError(f"{key}: expected a result that JSON can hold, got one where {error}") from error
            self.found[key] = found
            replace_text(self.path, text)
            self.bar.update()
        return self.found[key]

    def cost(self) -> dict[str, int]:
        """Processor seconds and seconds on the clock, those before an interruption included."""
        now = {"seconds": _processor_seconds(), "wall_seconds": time.monotonic()}
        return {key: round(self.earlier[key] + now[key] - self.start[key]) for key in now}

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def _partial(path: Path) -> dict[str, Any]:
    """What an interrupted run has left."""
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        cost = stored["cost"]
        if set(cost) != {"seconds", "wall_seconds"} or not isinstance(stored["found"], dict) or not stored["stamp"]:
            raise ValueError("other content")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected an interrupted run, got {error}; remove the file to begin anew") from error
    return stored


def _processor_seconds() -> float:
    return sum(os.times()[:4])


def _gaps(value: Any) -> Any:
    """NaN, which JSON has not, as None."""
    if isinstance(value, Mapping):
        return {key: _gaps(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_gaps(v) for v in value]
    return None if value != value else value


def _text(name: str, records: Mapping[str, Record]) -> str:
    fields = ("rows", "arrays", "protocol", "run")
    content = {p: {f: getattr(records[p], f) for f in fields} for p in SIZES if p in records}
    try:
        return json.dumps({"schema": SCHEMA, "name": name, "records": content}, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected rows, arrays and protocol that JSON can hold, got {error}") from error


def _loaded_code() -> str:
    """Hash of the source of every module of the package that is loaded, those of the experiment among them."""
    files = {m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == __package__ and m.__file__}
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()
