"""Every ready method has seeded defects, they fit its code, all were noticed, and the check itself can fail."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from peftref.catalog import METHODS, PARTS
from tools import forked, mutants

ROOT = Path(__file__).resolve().parents[2]
READY = [method.slug for method in METHODS if method.status == "ready"]
LEAST = 6  # defects of a method

# A tree as small as can be: the method named lame has one function, and a test that looks at one of its values.
MODULE = "def twice(x):\n    # a comment\n    return 2 * x\n"
TEST = "from peftref.tta.lame import twice\n\n\ndef test_twice():\n    assert twice(3) == 6\n"
LISTED = {
    "three times": ("2 * x", "3 * x"),
    "the square": ("return 2 * x", "return x**2"),
    "another comment": ("# a comment", "# no comment"),
    "no import": ("def twice", "raise ValueError\n\n\ndef twice"),
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(forked, "SLOW", ())
    files = {
        "peftref/__init__.py": "", "peftref/tta/__init__.py": "", "peftref/tta/lame.py": MODULE,
        "tests/tta/test_lame.py": TEST, "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--no-such-option'\n",
        "tools/__init__.py": "", "tools/forked.py": (ROOT / "tools/forked.py").read_text(encoding="utf-8"),
        "book/_results/lame.json": "[]",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def write(tree: Path, *names: str, **more: str) -> None:
    lines = []
    for name in names:
        old, new = LISTED[name]
        lines += ["[[mutant]]", f"what = '{name}'", f"old = {json.dumps(old)}", f"new = {json.dumps(new)}"]
        lines += [f"{key} = {value}" for key, value in more.items()]
    path = tree / mutants.LISTS / "lame.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("slug", READY)
def test_every_ready_method_has_mutants(slug: str) -> None:
    assert len(mutants.load(slug)) >= LEAST


def test_every_list_belongs_to_something_and_fits_the_code() -> None:
    files = {path.stem for path in (ROOT / mutants.LISTS).glob("*")}
    assert files == set(mutants.lists()) <= {*READY, *(part.slug for part in PARTS)}
    assert not mutants.outdated(mutant for name in files for mutant in mutants.load(name))


def test_every_mutant_was_killed_when_they_were_last_run() -> None:
    if not mutants.recorded():
        pytest.skip("not run yet: make mutants")
    killed = {
        (name, one["what"], one["file"])
        for name, found in mutants.recorded().items()
        for one in found["mutants"]
        if one["status"] == "killed"
    }
    listed = {(name, mutant.what, mutant.file) for name in mutants.lists() for mutant in mutants.load(name)}
    assert listed == killed, "run make mutants"


def test_a_defect_is_killed_and_a_changed_comment_survives(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tree, "three times", "the square", "another comment")
    assert mutants.main(["--jobs", "2"], tree) == 1
    found = mutants.recorded(tree)["lame"]
    assert (found["killed"], found["total"]) == (2, 3)
    assert [one["status"] for one in found["mutants"]] == ["killed", "killed", "survived"]
    assert found["mutants"][0]["by"] == "tests/tta/test_lame.py::test_twice"
    assert "another comment (peftref/tta/lame.py): survived" in capsys.readouterr().out
    assert (tree / "peftref/tta/lame.py").read_text(encoding="utf-8") == MODULE
    write(tree, "three times")  # begins with the test that was recorded
    assert mutants.main([], tree) == 0 and mutants.recorded(tree)["lame"]["total"] == 1


def test_what_cannot_be_imported_is_no_mutant_unless_it_says_so(tree: Path) -> None:
    write(tree, "no import")
    assert mutants.main([], tree) == 1 and mutants.recorded(tree)["lame"]["mutants"][0]["status"] == "invalid"
    write(tree, "no import", breaks_import="true")
    assert mutants.main([], tree) == 0


def test_tests_that_fail_anyhow_kill_nothing(tree: Path) -> None:
    write(tree, "three times")
    (tree / "tests/tta/test_lame.py").write_text(TEST + "    raise ValueError\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="expected tests that pass"):
        mutants.main([], tree)
    assert not (tree / mutants.RECORD).exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("4 * x", "5 * x", "got it 0 times"),
        ("twice", "thrice", ""),
        ("x", "y", "got it 2 times"),
        ("2 * x", "2 * x", "differs"),
        ("2 * x", "2 *", "expected Python"),
    ],
)
def test_a_list_that_is_out_of_date(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    monkeypatch.setitem(LISTED, "this", (old, new))
    write(tree, "this")
    assert mutants.main(["--check"], tree) == (1 if said else 0)
    assert said in capsys.readouterr().err


def test_unknown_fields_and_repeated_names_are_refused(tree: Path) -> None:
    write(tree, "three times", wat="1")
    with pytest.raises(ValueError, match="fields of a Mutant"):
        mutants.load("lame", tree)
    write(tree, "three times", "three times")
    with pytest.raises(ValueError, match="different names"):
        mutants.load("lame", tree)


def test_the_copy_of_the_package_is_what_is_tested() -> None:
    """Not an installed one: a module of the real tree that raises when it is imported."""
    test = ("tests/tta/test_bn_adapt.py",)
    broken = mutants.Mutant(
        "lame", "raises", '__all__ = ["BNAdapt"]', "raise ValueError", "peftref/tta/baselines/bn_adapt.py", test, True
    )
    comment = mutants.Mutant("lame", "comment", "# eq-tta-bn", "# eq", "peftref/tta/baselines/bn_adapt.py", test)
    verdicts = mutants.run([broken, comment])
    assert [verdict.status for verdict in verdicts.values()] == ["killed", "survived"]
