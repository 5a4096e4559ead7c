"""What follows from paired values follows by rule; what an experiment found is kept, whole, and checked when read."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

import peftref
from peftref import _experiments, recording
from peftref._records import plain
from peftref.results import Record, finding, glue, interval, judge, recorded

PAIRED = [1.2, 0.8, 1.5, 0.9, 1.1]


@pytest.mark.parametrize("n", [2, 3, 5, 17])
def test_the_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 1.0, n)
    found = judge(values)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert found[:3] == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(DescrStatsW(values).tconfint_mean(), rel=1e-12)


def test_the_interval_by_hand() -> None:
    """1, 3: mean 2, standard deviation sqrt 2, standard error 1, and 12.706 of them for one degree of freedom."""
    assert judge([1.0, 3.0])[:3] == pytest.approx((2.0, 2.0 - 12.7062047, 2.0 + 12.7062047))


def test_intervals_of_many_steps_at_once() -> None:
    curves = np.random.default_rng(0).normal(size=(4, 6))
    each = [judge(column)[:3] for column in curves.T]
    assert np.allclose(np.stack(interval(curves)).T, each)
    with pytest.raises(ValueError, match=r"^values: expected"):
        interval([[1.0, 2.0]])


@pytest.mark.parametrize(
    ("values", "given", "status"),
    [
        (PAIRED, {}, "matched"),
        (PAIRED, {"claim": "below"}, "differs"),
        ([-v for v in PAIRED], {}, "differs"),
        ([-v for v in PAIRED], {"claim": "below"}, "matched"),
        ([-1.0, 2.0, 0.5], {}, "open"),
        ([-1.0, 2.0, 0.5], {"claim": "below"}, "open"),
        (PAIRED, {"against": 2.0}, "differs"),
        (PAIRED, {"against": 1.3}, "open"),
        (PAIRED, {"claim": "paper", "paper": 1.3}, "matched"),
        (PAIRED, {"claim": "paper", "paper": 1.5}, "differs"),
        (PAIRED, {"claim": "paper", "paper": 0.0}, "differs"),
        (PAIRED, {"paper": 9.0}, "matched"),  # the paper's number stands beside; the claim is a direction
        ([0.0, 0.0], {}, "open"),  # exactly where the sides meet
        ([0.1, 0.1], {}, "matched"),  # no spread at all
        ([2.0, 2.0], {"claim": "paper", "paper": 2.0}, "matched"),
        ([4.178], {"claim": "paper", "paper": 4.18, "margin": 0.005}, "matched"),
        ([4.172], {"claim": "paper", "paper": 4.18, "margin": 0.005}, "differs"),
        ([0.1], {"margin": 0.2}, "open"),
        ([0.1], {"margin": 0.05}, "matched"),
    ],
)
def test_status(values: list[float], given: dict[str, Any], status: str) -> None:
    assert judge(values, **given).status == status


def test_an_end_that_touches_decides_nothing() -> None:
    low, high = judge(PAIRED)[1:3]
    assert judge(PAIRED, against=low).status == judge(PAIRED, against=high).status == "open"
    assert judge(PAIRED, claim="paper", paper=high).status == "matched"


@pytest.mark.parametrize(
    ("name", "values", "given"),
    [
        ("values", [], {}), ("values", [1.0], {}), ("values", [1.0, math.nan], {}), ("values", [1.0, math.inf], {}),
        ("values", [[1.0, 2.0], [1.0, 2.0]], {}), ("values", ["a", "b"], {}), ("values", [1.0, None], {}),
        ("values", [], {"margin": 1.0}), ("margin", [1.0], {"margin": -1.0}), ("margin", [1.0], {"margin": math.nan}),
        ("claim", PAIRED, {"claim": "higher"}), ("paper", PAIRED, {"claim": "paper"}),
        ("paper", PAIRED, {"claim": "paper", "paper": math.nan}), ("against", PAIRED, {"against": math.inf}),
    ],
)  # fmt: skip
def test_what_cannot_be_judged(name: str, values: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        judge(values, **given)


def test_a_finding_holds_everything() -> None:
    row = finding("gains", PAIRED, where="Table 3", unit="points", paper=2.0, level={"source": 57.1, "LAME": 49.6})
    assert row["claim"] == "gains" and row["where"] == "Table 3" and row["unit"] == "points" and row["paper"] == 2.0
    assert (row["ours"], row["low"], row["high"], row["status"]) == judge(PAIRED)
    assert row["rule"] == {"claim": "above", "against": 0.0, "margin": None}
    assert row["seeds"] == 5 and row["values"] == PAIRED and row["level"] == {"source": 57.1, "LAME": 49.6}
    assert finding("gains", torch.tensor(PAIRED), where="Table 3", unit="points")["ours"] == pytest.approx(1.1)


def test_our_own_question_has_no_status() -> None:
    assert finding("gains", PAIRED, where="ours", unit="points")["status"] is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("what", {"what": " "}), ("where", {"where": ""}), ("paper", {"where": "ours", "paper": 1.0}),
        (r"level\['source'\]", {"level": {"source": math.nan}}), ("values", {"values": [1.0]}),
    ],
)  # fmt: skip
def test_bad_findings(name: str, change: dict[str, Any]) -> None:
    given = {"what": "gains", "values": PAIRED, "where": "Table 3", "unit": "points"} | change
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        finding(**given)


# A part with one experiment, in a folder of its own.
TOY = '''
"""An experiment: the mean of a few numbers."""

from peftref.results import finding

PRESETS = {"smoke": {"seeds": [0, 1, 2], "size": 4}, "cpu": {"seeds": [0, 1], "size": 8}, "gpu": {"seeds": [0, 1]}}
MINUTES = {"smoke": 0.05, "cpu": 30, "gpu": 2}
NEEDS = {"cpu": ("tiny_imagenet",), "gpu": ("cuda",)}
CALLS = []


def piece(seed, size):
    CALLS.append(seed)
    return {"gain": 1.0 + seed, "size": size}


def run(each, *, data=None, seeds, size=2):
    found = [each(f"seed {s}", piece, s, size) for s in seeds]
    rows = [finding("gains", [f["gain"] for f in found], where="Table 1", unit="points", paper=2.0)]
    return {"rows": rows, "arrays": {"curve": [[1.0, float("nan")]]}, "protocol": {"data": str(data)}}
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of ``toys/toy``, an experiment of a part that only this test has; the current folder is empty."""
    part = tmp_path / "more/toys"
    for folder in (part, part / "experiments"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (part / "toy.py").write_text('"""The method."""\nSCALE = 1\n')
    (part / "experiments/toy.py").write_text(textwrap.dedent(TOY))
    monkeypatch.setattr(peftref, "__path__", [*peftref.__path__, str(tmp_path / "more")])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield recording.experiment("toys/toy")
    for name in [name for name in sys.modules if name.startswith("peftref.toys")]:
        del sys.modules[name]


def again(toy: Any, change: Callable[[str], str], file: str = "experiments/toy.py") -> Any:
    """The experiment after an edit."""
    path = Path(toy.__file__).parents[1] / file
    path.write_text(change(path.read_text()))
    del sys.modules[toy.__name__]
    return recording.experiment("toys/toy")


def record(folder: Path, preset: str = "smoke", **options: Any) -> Record:
    return recording.record("toys/toy", preset, folder=folder, write=True, **options)


def test_a_run_is_kept_with_all_that_belongs_to_it(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    done = record(tmp_path)
    out, err = capsys.readouterr()
    assert out == "toys/toy, smoke: about 0.05 minutes\n" and "piece" in err  # the bar stays out of the output
    found = recorded("toys/toy", "smoke", folder=tmp_path)
    assert found == done and found["gains"]["ours"] == 2.0 and found["gains"]["status"] == "open"
    assert np.isnan(found.array("curve")[0, 1]) and found.array("curve")[0, 0] == 1.0
    assert found.protocol == {"seeds": [0, 1, 2], "size": 4, "data": "None"}
    assert set(found.run["hardware"]) == {"processor", "threads", "accelerator"}
    assert set(found.run["versions"]) == {"python", "torch", "peftref"}
    assert found.run["seconds"] >= 0 and found.run["wall_seconds"] >= 0 and found.run["peak_mb"] > 50
    assert found.run["pieces"] == 3 and len(found.run["code"]) == 64
    (shown,) = found.table().to_dict("records")
    assert shown == {
        "claim": "gains",
        "where": "Table 1",
        "paper": "2",
        "ours, 95 % interval": "2 [-0.484, 4.48] points",
        "seeds": 3,
        "status": "open",
    }
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["toy.json"]


def test_what_is_not_to_be_written_leaves_nothing(toy: Any, tmp_path: Path) -> None:
    done = recording.record("toys/toy", "smoke")
    assert done["gains"]["seeds"] == 3 and not [*Path.cwd().iterdir()] and not [*tmp_path.glob("*.json")]


def test_sizes_stand_beside_each_other(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny-imagenet-200").mkdir()
    record(tmp_path, "cpu", data=tmp_path)
    record(tmp_path, "smoke")
    assert recorded("toys/toy", folder=tmp_path).protocol["data"] == str(tmp_path)
    assert list(json.loads((tmp_path / "toy.json").read_text())["records"]) == ["smoke", "cpu"]


def test_a_size_recorded_meanwhile_is_kept(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-imagenet-200").mkdir()
    slow = toy.piece

    def piece(seed: int, size: int) -> dict[str, Any]:
        if size == 8 and seed == 0:
            record(tmp_path, "smoke")
        return slow(seed, size)

    monkeypatch.setattr(toy, "piece", piece)
    record(tmp_path, "cpu", data=tmp_path)
    assert recorded("toys/toy", "smoke", folder=tmp_path).rows and recorded("toys/toy", folder=tmp_path).rows


def interrupted(toy: Any, folder: Path, at: int = 2) -> Path:
    """A run that broke off at a seed; returns what it left."""
    whole = toy.piece

    def broken(seed: int, size: int) -> Any:
        if seed == at:
            raise KeyboardInterrupt
        return whole(seed, size)

    toy.piece = broken
    with pytest.raises(KeyboardInterrupt):
        record(folder)
    toy.piece = whole
    (left,) = folder.glob(".*.partial.json")
    assert not (folder / "toy.json").exists()
    return left


def test_a_run_goes_on_where_it_was(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    left = interrupted(toy, tmp_path)
    assert toy.CALLS == [0, 1] and f"2 pieces are kept in {left}" in capsys.readouterr().err
    done = record(tmp_path)
    assert toy.CALLS == [0, 1, 2] and not left.exists()
    assert done["gains"]["values"] == [1.0, 2.0, 3.0] and done.run["pieces"] == 3


def test_comments_and_docstrings_do_not_count_as_changes(toy: Any, tmp_path: Path) -> None:
    interrupted(toy, tmp_path)
    toy = again(toy, lambda code: code.replace("a few numbers", "some numbers") + "\n# the end\n")
    record(tmp_path)
    assert toy.CALLS == [2]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("experiments/toy.py", '"size": 4', '"size": 5'),  # settings
        ("experiments/toy.py", "1.0 + seed", "1.5 + seed"),  # the experiment
        ("toy.py", "SCALE = 1", "SCALE = 2"),  # the method
    ],
)
def test_other_settings_or_code_begin_anew_and_keep_the_old(
    toy: Any, tmp_path: Path, file: str, old: str, new: str
) -> None:
    left = interrupted(toy, tmp_path)
    before = left.read_text()
    toy = again(toy, lambda code: code.replace(old, new), file)
    record(tmp_path)
    assert toy.CALLS == [0, 1, 2] and left.with_suffix(".old").read_text() == before


def test_a_run_can_begin_anew_on_request(toy: Any, tmp_path: Path) -> None:
    left = interrupted(toy, tmp_path)
    record(tmp_path, resume=False)
    assert toy.CALLS == [0, 1, 0, 1, 2] and left.with_suffix(".old").exists() and not left.exists()


@pytest.mark.parametrize(
    "content", ["", '{"stamp": "a"', "[]", '{"stamp": "a", "found": {}}', '{"stamp": "a", "found": 1, "cost": {}}']
)
def test_damaged_pieces_are_named(toy: Any, tmp_path: Path, content: str) -> None:
    left = tmp_path / ".toys-toy-smoke.partial.json"
    left.write_text(content)
    with pytest.raises(ValueError, match=r"partial\.json: expected an interrupted run, got .*; remove the file"):
        record(tmp_path)
    assert not toy.CALLS and left.read_text() == content


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text[: len(text) // 2], "toy.json: expected a record of toys/toy"),
        (lambda text: "", "toy.json: expected a record"),
        (lambda text: "[]", "toy.json: expected a record"),
        (lambda text: text.replace('"schema": 2', '"schema": 1'), "schema 1"),
        (lambda text: text.replace("toys/toy", "toys/other"), "toys/other"),
        (lambda text: text.replace('"unit"', '"units"'), "a row without ['unit'] in 'smoke': 'gains'"),
        (lambda text: text.replace('"ours": 2.0', '"ours": NaN'), "NaN, which is no number"),
        (lambda text: text.replace('"ours": 2.0', '"ours": 1e999'), "numbers that are not finite"),
        (lambda text: text.replace('"ours": 2.0', '"ours": null'), "toy.json: expected a record"),
        (lambda text: text.replace('"open"', '"good"'), "a status 'good'"),
        (lambda text: text.replace('"protocol"', '"protocols"'), "protocols"),
        (lambda text: text.replace('"peak_mb"', '"peak"'), "a run without ['peak_mb']"),
        (lambda text: text.replace('"records"', '"record"'), "got one without 'records'"),
    ],
)
def test_bad_files_are_named(toy: Any, tmp_path: Path, change: Callable[[str], str], sentence: str) -> None:
    record(tmp_path)
    file = tmp_path / "toy.json"
    content = change(file.read_text())
    assert content != file.read_text()
    file.write_text(content)
    with pytest.raises(ValueError, match="toy.json: expected a record of toys/toy, schema 2, got") as caught:
        recorded("toys/toy", "smoke", folder=tmp_path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    before = len(toy.CALLS)
    with pytest.raises(ValueError, match="toy.json: expected"):  # nor is it overwritten by a new run
        record(tmp_path)
    assert len(toy.CALLS) == before and file.read_text() == content


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("name", lambda: recorded("toys/nothing")),
        ("name", lambda: recorded("toy")),
        ("name", lambda: recorded("toys/../toy")),
        ("name", lambda: recording.record("toys/nothing")),
        ("name", lambda: recording.record("nowhere/toy")),
        ("name", lambda: recording.record("toys/experiments/toy")),
        ("preset", lambda: recording.record("toys/toy", "large")),
        ("data", lambda: recording.record("toys/toy", "cpu")),
        ("data", lambda: recording.record("toys/toy", "cpu", data="nowhere")),
        ("data", lambda: recording.record("toys/toy", "cpu", data=".")),
        ("claim", lambda: recording.record("toys/toy", "smoke")["loses"]),
        ("name", lambda: recording.record("toys/toy", "smoke").array("curves")),
    ],
)
def test_what_is_not_there(toy: Any, name: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, KeyError)) as caught:
        call()
    assert str(caught.value).strip("\"'").startswith(f"{name}: expected")
    assert not [*Path.cwd().iterdir()]


def test_the_missing_size_is_named_with_the_call_that_makes_it(toy: Any, tmp_path: Path) -> None:
    record(tmp_path)
    with pytest.raises(
        ValueError, match=r"preset: expected one of \['smoke'\].*record\('toys/toy', 'cpu', write=True\)"
    ):
        recorded("toys/toy", folder=tmp_path)


def test_cuda_is_asked_for_before_anything_runs(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="preset: expected a machine with CUDA"):
        recording.record("toys/toy", "gpu")
    assert not toy.CALLS


def test_missing_extras_are_named(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(toy.NEEDS, "smoke", ("text",))
    monkeypatch.setitem(_experiments.EXTRAS, "text", ("json", "nowhere_to_be_found"))
    with pytest.raises(ValueError, match=r"^preset: expected the extra.*peftref\[text\].*got no nowhere_to_be_found$"):
        recording.record("toys/toy", "smoke")
    monkeypatch.setitem(_experiments.EXTRAS, "text", ("json",))
    assert recording.record("toys/toy", "smoke").rows


def test_an_experiment_that_lacks_something_is_named(toy: Any) -> None:
    with pytest.raises(ValueError, match=r"toys\.experiments\.toy: expected .* got nothing for \['NEEDS'\]"):
        again(toy, lambda code: code.replace("NEEDS =", "WANTS ="))
    with pytest.raises(ValueError, match=r"got nothing for \[.MINUTES\['gpu'\].\]"):
        again(toy, lambda code: code.replace("WANTS =", "NEEDS =").replace(', "gpu": 2}', "}"))


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"size": size}', '"size": object()}', "seed 0: expected a result that JSON can hold"),
        ('"data": str(data)', '"data": object()', "toys/toy: expected rows, arrays and protocol that JSON can hold"),
        ('"data": str(data)', '"rate": float("inf")', "toys/toy: expected rows, arrays and protocol that JSON can"),
        ('{"rows": rows', '{"rows": rows + rows', "two of the same claim"),
    ],
)
def test_what_cannot_be_kept_is_an_error(toy: Any, tmp_path: Path, old: str, new: str, error: str) -> None:
    again(toy, lambda code: code.replace(old, new))
    with pytest.raises((TypeError, ValueError), match=error):
        record(tmp_path)
    assert not (tmp_path / "toy.json").exists()


def test_arrays_and_tensors_become_lists_of_short_numbers() -> None:
    given = {1: torch.tensor([1 / 3]), "b": np.float32(0.25), "c": (True, range(2)), "d": None}
    assert plain(given) == {"1": [0.333333], "b": 0.25, "c": [True, [0, 1]], "d": None}


def test_numbers_for_the_text(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    shown: list[Any] = []
    monkeypatch.setattr(IPython.display, "display", lambda *data, **options: shown.append((data[0], options)))
    glue("toy-gain", -1.26, ".1f")
    glue("toy-name", "fog")
    (number, options), (word, _) = shown
    assert number == {"application/papermill.record/text/plain": "\N{MINUS SIGN}1.3"}
    assert options["metadata"]["scrapbook"]["name"] == "toy-gain" and options["raw"]
    assert [*word.values()] == ["fog"]
