"""Every ready method has an experiment and a complete record; the smallest size gives the stored numbers again."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftref import recording
from peftref._records import FOLDER, file_name, read
from peftref.catalog import METHODS
from peftref.recording import SIZES, experiment, experiments, record
from peftref.results import judge, recorded
from tests.frame import _wheel as wheels

METHODS_READY = [f"{method.part}/{method.slug}" for method in METHODS if method.status == "ready"]
READY = [*dict.fromkeys([*METHODS_READY, *experiments()])]  # introductions of parts may have one too
LARGEST = 300_000  # bytes of a record
RTOL = 1e-3  # another processor rounds differently, and the smallest size is too short for that to grow
TARGETS = {"matched", "differs", "open", None}


@pytest.mark.parametrize("name", READY)
def test_an_experiment_says_what_it_takes(name: str) -> None:
    found = experiment(name)
    assert {"smoke", "cpu"} <= set(found.PRESETS) <= set(SIZES), f"{name}: presets {list(found.PRESETS)}"
    assert set(found.NEEDS) <= set(found.PRESETS) and not found.NEEDS.get("smoke"), f"{name}: smoke needs nothing"
    assert all(0 < found.MINUTES[preset] < math.inf for preset in found.PRESETS)
    assert found.MINUTES["smoke"] <= 0.1 and found.MINUTES["cpu"] <= 120 and found.MINUTES.get("gpu", 0) <= 10, name
    for preset in ("t4", "gpu"):
        assert preset not in found.PRESETS or "cuda" in found.NEEDS[preset], f"{name}: {preset} is for a GPU"
    json.dumps(recording.plain(found.PRESETS))


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf, with where it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{place}.{key}")
    elif isinstance(value, list) and not (value and all(isinstance(v, int | float) for v in value)):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{place}[{i}]")
    else:
        yield place, value


@pytest.mark.parametrize("name", READY)
def test_the_smallest_size_gives_the_stored_numbers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = recorded(name, "smoke")
    keys: list[str] = []
    call = recording._Pieces.__call__

    def noted(self: Any, key: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        keys.append(key)
        return call(self, key, function, *args, **options)

    monkeypatch.setattr(recording._Pieces, "__call__", noted)
    monkeypatch.chdir(tmp_path)
    found = record(name, "smoke")
    assert len(set(keys)) == len(keys) > 0, f"{name}: each piece of work has a key of its own"
    assert [row["claim"] for row in found.rows] == [row["claim"] for row in stored.rows]
    for new, old in zip(found.rows, stored.rows, strict=True):
        assert [new[key] for key in ("where", "unit", "paper", "seeds")] == [
            old[key] for key in ("where", "unit", "paper", "seeds")
        ]
        scale = max(map(abs, (*old["values"], *old["level"].values())))
        assert np.allclose(new["values"], old["values"], rtol=RTOL, atol=RTOL * scale), f"{name}: {new['claim']}"
    again = dict(numbers(recording._gaps(found.arrays)))
    assert again.keys() == dict(numbers(stored.arrays)).keys()
    for place, old in numbers(stored.arrays):
        new = again[place]
        if isinstance(old, list) and old:
            assert np.allclose(new, old, rtol=RTOL, atol=RTOL * max(map(abs, old))), f"{name}: {place}"
        elif isinstance(old, float):
            assert new == pytest.approx(old, rel=RTOL, abs=1e-6), f"{name}: {place}"
        else:
            assert new == old, f"{name}: {place}"


@pytest.mark.parametrize("name", READY)
def test_the_evidence_is_there_and_complete(name: str) -> None:
    """Whoever reads a number can tell what the paper says of it, how it was judged, and how to get it again."""
    found = recorded(name)
    for row in found.rows:
        what = f"{name}, {row['claim']}"
        assert row["where"].strip(), f"{what}: where does the paper say so? 'ours' if it does not ask"
        assert isinstance(row["unit"], str) and row["seeds"] == len(row["values"]) >= 1, what
        assert row["low"] <= row["ours"] <= row["high"], what
        ours = row["where"] == "ours"
        assert row["paper"] is None if ours else True, f"{what}: a number of the paper stands somewhere"
        assert (row["status"] is None) == ours and row["status"] in TARGETS, what
        if "rule" in row and not ours:
            again = judge(row["values"], paper=row["paper"], **row["rule"])
            assert again.status == row["status"] and again.low == pytest.approx(row["low"]), what
    assert found.protocol, f"{name}: data, networks and settings"
    assert set(found.run["hardware"]) == {"processor", "threads", "accelerator"}
    assert set(found.run["versions"]) == {"python", "torch", "peftref"}
    assert found.run["seconds"] >= 0 and found.run["peak_mb"] > 50
    # Five seconds of a quiet core are the aim; beside other work processor seconds double.
    assert recorded(name, "smoke").run["seconds"] <= 15, f"{name}: smoke runs in every test"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[!.]*.json")), ids=lambda path: path.stem)
def test_a_record_is_small_and_belongs_to_a_method(path: Path) -> None:
    name = json.loads(path.read_text(encoding="utf-8"))["name"]
    assert name in READY and file_name(name) == path.name
    assert path.stat().st_size < LARGEST
    assert read(name)
    assert not re.search(r'"/\w+/|[A-Z]:\\\\', path.read_text(encoding="utf-8")), "a folder of the machine it ran on"


def test_an_installed_package_has_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels.build(tmp_path)) as wheel:
        packed = {name.removeprefix("peftref/recorded/") for name in wheel.namelist() if "/recorded/" in name}
    assert packed == {path.name for path in FOLDER.glob("[!.]*.json")}
