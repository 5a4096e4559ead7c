"""Recording from a command line, one experiment or all that need a GPU; a stand-in takes the place of the device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftref import recording
from peftref.recording import experiments
from tools import gpu
from tools import record as tool

EXPERIMENTS = {
    "tta/slow": SimpleNamespace(PRESETS={"gpu": {}}, MINUTES={"gpu": 8.0}, NEEDS={"gpu": ("cuda",)}),
    "tta/short": SimpleNamespace(PRESETS={"cpu": {}, "gpu": {}}, MINUTES={"cpu": 90, "gpu": 0.5}, NEEDS={}),
    "tta/small": SimpleNamespace(PRESETS={"cpu": {}}, MINUTES={"cpu": 1.0}, NEEDS={}),
    "merging/data": SimpleNamespace(PRESETS={"gpu": {}}, MINUTES={"gpu": 1.0}, NEEDS={"gpu": ("cifar100",)}),
    "merging/long": SimpleNamespace(PRESETS={"gpu": {}}, MINUTES={"gpu": 3.0}, NEEDS={}),
}


class Clock:
    """Every run takes what it said; ``now`` are seconds."""

    now = 0.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float]]:
    """A machine with CUDA, five experiments, a clock that only runs move; the list of what was run, with its limit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "experiments", lambda: list(EXPERIMENTS))
    monkeypatch.setattr(gpu, "experiment", EXPERIMENTS.__getitem__)
    monkeypatch.setattr(sys.modules[gpu.lacking.__module__], "experiment", EXPERIMENTS.__getitem__)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: Clock.now))
    monkeypatch.delenv("OUT", raising=False)
    Clock.now = 100.0
    return []


def runner(ran: list, codes: dict[str, int | None] | None = None) -> Any:
    def run(arguments: list[str], seconds: float) -> int | None:
        ran.append((arguments, seconds))
        name = arguments[1]
        Clock.now += 60 * (EXPERIMENTS[name].MINUTES["gpu"] if name in EXPERIMENTS else 0.25)
        return (codes or {}).get(name, 0)

    return run


def test_without_cuda_one_line_and_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran: list = []
    assert gpu.main([], runner(ran)) == 2 and not ran
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "CUDA" in err


def test_tests_first_then_the_shortest_within_the_limit(device: list, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main([], runner(device)) == 0
    assert [arguments[:3] for arguments, _ in device] == [
        ["pytest", "-q", "-m"], ["tools.record", "tta/short", "gpu"], ["tools.record", "merging/long", "gpu"]
    ]  # fmt: skip
    assert [seconds for _, seconds in device] == [540, 525, 495]  # never more than what is left of nine minutes
    out = capsys.readouterr().out
    assert "merging/data: left out; data: expected a folder that holds cifar100" in out
    assert "tta/slow: left out; it takes about 8 minutes, and 5.2 are left" in out
    assert "tta/short: recorded\n" in out and "small" not in out


def test_with_data_and_time_everything_runs(device: list, tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    assert gpu.main(["--minutes", "20", "--data", str(tmp_path)], runner(device)) == 0
    names = [arguments[1] for arguments, _ in device[1:]]
    assert names == ["tta/short", "merging/data", "merging/long", "tta/slow"]
    assert all(arguments[3:] == ["--data", str(tmp_path)] for arguments, _ in device[1:])


def test_what_fails_or_is_stopped_is_said_and_the_rest_goes_on(device: list, capsys: pytest.CaptureFixture) -> None:
    codes = {"-q": 1, "tta/short": None, "merging/long": 2}
    assert gpu.main(["--minutes", "30"], runner(device, codes)) == 1
    out = capsys.readouterr().out
    assert "tests marked cuda: failed" in out and "tta/short: stopped, the time is over" in out
    assert "merging/long: failed" in out and "tta/slow: recorded" in out


def test_no_marked_test_is_no_failure(device: list) -> None:
    assert gpu.main([], runner(device, {"-q": 5})) == 0


def test_results_and_unfinished_runs_are_copied(device: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, out = tmp_path / "recorded", tmp_path / "out"
    recorded.mkdir()
    (recorded / "short.json").write_text("{}")
    (recorded / ".merging-long-gpu.partial.json").write_text("{}")
    keep = gpu.keep
    monkeypatch.setattr(gpu, "keep", lambda name, out: keep(name, out, recorded))
    monkeypatch.setenv("OUT", str(out))
    gpu.main([], runner(device))
    assert sorted(path.name for path in out.iterdir()) == ["merging-long-gpu.partial.json", "short.json"]


def test_a_command_that_takes_too_long_is_stopped() -> None:
    start = time.monotonic()
    assert gpu.command(["this"], 60) == 0  # it prints its poem
    assert gpu.command(["http.server", "0"], 1) is None and time.monotonic() - start < 60


def test_every_experiment_for_a_gpu_is_found() -> None:
    assert [name for _, name in sorted(gpu.jobs())] == [name for _, name in gpu.jobs()]
    assert {name for _, name in gpu.jobs()} <= set(experiments())


def test_recording_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked: list[Any] = []

    def record(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        if options["data"] == "nowhere":
            raise ValueError("data: expected a folder, got 'nowhere'")
        if options["data"] == "stop":
            raise KeyboardInterrupt
        return SimpleNamespace(table=lambda: SimpleNamespace(to_string=lambda index: "the rows"))

    monkeypatch.setattr(tool, "record", record)
    assert tool.main(["tta/lame"]) == 0 and capsys.readouterr().out == "the rows\n"
    assert asked[-1] == (("tta/lame", "cpu"), {"data": None, "resume": True, "write": True})
    assert tool.main(["tta/lame", "gpu", "--data", "nowhere", "--anew"]) == 2
    assert asked[-1] == (("tta/lame", "gpu"), {"data": "nowhere", "resume": False, "write": True})
    out, err = capsys.readouterr()
    assert not out and err == "data: expected a folder, got 'nowhere'\n"
    assert tool.main(["tta/lame", "--data", "stop"]) == 130


def test_make_hands_its_words_on() -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # of `make test`

    def said(*words: str) -> str:
        command = ["make", "-n", "--no-print-directory", *words]
        done = subprocess.run(command, cwd=gpu.ROOT, env=env, text=True, capture_output=True)
        return done.stdout.strip().splitlines()[-1]

    assert said("record", "NAME=tta/lame").endswith("-m tools.record tta/lame cpu")
    assert said("record", "NAME=tta/lame", "PRESET=gpu", "DATA=~/d").endswith("tools.record tta/lame gpu --data ~/d")
    assert said("gpu").endswith("-m tools.gpu --minutes 9")
    assert said("gpu", "MINUTES=3", "DATA=d").endswith("-m tools.gpu --minutes 3 --data d")


def test_lacking_is_the_question_that_record_asks() -> None:
    assert gpu.lacking is recording.lacking
