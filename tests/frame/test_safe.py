"""Nothing that is read can run code, and a file that is written is whole, however the writing ends."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from peftref import recording
from peftref._replacing import replace_text, replacing
from peftref.adapters import hydra
from peftref.adapters.baselines import lora
from peftref.adapters.core import files
from peftref.adapters.core.injection import inject
from peftref.merging.baselines import arithmetic
from peftref.merging.core import checkpoints, quantise
from peftref.results import finding
from tools import chapters, mutants, readme

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for part in ("peftref", "tools", "benchmarks", "examples") for p in (ROOT / part).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}


def dangers(tree: ast.AST) -> list[str]:
    """What in a module reads data that could run code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found.append(f"from {node.module} import ...")
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if options.get("allow_pickle", "False") != "False":
                found.append(f"{name} with allow_pickle")
            if name in ("joblib.load", "pd.read_pickle", "pandas.read_pickle", "eval", "exec", "yaml.load"):
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_file_that_is_read_can_run_code(path: Path) -> None:
    found = dangers(ast.parse(path.read_text(encoding="utf-8")))
    if path == ROOT / "peftref/data/read.py":  # the one format that others pickled, read by its own unpickler
        found.remove("import pickle")
    assert not found


def test_the_scan_finds_each_danger() -> None:
    for text in (
        "import pickle",
        "from pickle import load",
        "import dill as pickle",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "joblib.load(f)",
        "def f():\n    import marshal",
    ):
        assert dangers(ast.parse(text)), text
    assert not dangers(ast.parse("torch.load(f, weights_only=True); np.load(f, allow_pickle=False); json.load(f)"))


def test_the_unpickler_of_cifar_names_arrays_only() -> None:
    """``pickle`` is used for its class alone, and the class says itself which names are found."""
    tree = ast.parse((ROOT / "peftref/data/read.py").read_text(encoding="utf-8"))
    used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    assert used == {"pickle.Unpickler", "pickle.UnpicklingError"}
    (unpickler,) = (
        n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.bases and "pickle" in ast.unparse(n.bases[0])
    )
    assert "find_class" in {n.name for n in unpickler.body if isinstance(n, ast.FunctionDef)}


# --- Whole files ------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As a Ctrl-C: no ``except Exception`` sees it."""


def adapted(kind: type = lora.LoRA) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, kind, ["0"])
    return net


def notebook(folder: Path) -> Path:
    path = folder / "book" / "part" / "page.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        nb = nbformat.v4.new_notebook()
        nb.cells = [nbformat.v4.new_code_cell("x = 1")]
        nbformat.write(nb, path)
    return path


def record(folder: Path) -> None:
    rows = [finding("a", [1.0, 2.0], where="Table 1", unit="points")]
    run = mock.Mock(return_value={"rows": rows})
    toy = mock.Mock(PRESETS={"smoke": {}}, MINUTES={"smoke": 1.0}, run=run)
    stands_in = {"experiment": lambda name: toy, "lacking": lambda *given: None, "stamp": lambda *given: ""}
    with mock.patch.multiple(recording, **stands_in):
        recording.record("toys/toy", "smoke", folder=folder, write=True)


def pages(folder: Path) -> None:
    with mock.patch.object(readme, "wanted", lambda root: {root / "book/speed.md": os.urandom(8)}):
        readme.main([], folder)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "peftref.adapters.core.files.save": lambda folder: files.save(adapted(), folder),
    "peftref.adapters.hydra.save_as_lora": lambda folder: hydra.save_as_lora(adapted(hydra.Hydra), folder),
    "peftref.merging.core.quantise.save": lambda folder: quantise.quantise({"w": torch.randn(4, 4)}, 16).save(
        folder / "codes.safetensors"
    ),
    "peftref.recording.record": record,
    "tools.chapters.note": lambda folder: chapters.note(notebook(folder), {"seconds": 1}, folder),
    "tools.readme.main": pages,
}


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """From the call on, whoever writes a file gets half-way."""

    def text(self: Path, data: str, *args: Any, **kwargs: Any) -> None:
        self.open("w").write(data[: len(data) // 2])
        raise Interrupted

    def raw(self: Path, data: bytes) -> None:
        self.open("wb").write(data[: len(data) // 2])
        raise Interrupted

    def tensors(state: Any, path: Any, metadata: Any = None) -> None:
        raw(Path(path), safetensors.torch.save(state, metadata))

    def start() -> None:
        monkeypatch.setattr(Path, "write_text", text)
        monkeypatch.setattr(Path, "write_bytes", raw)
        for module in (files, quantise):
            monkeypatch.setattr(module, "save_file", tensors)

    yield start


@pytest.mark.parametrize("name", WRITERS)
def test_an_interrupted_writer_leaves_the_old_file(name: str, tmp_path: Path, interrupt: Callable[[], None]) -> None:
    notebook(tmp_path)
    torch.manual_seed(0)
    WRITERS[name](tmp_path)
    before = content(tmp_path)
    interrupt()
    with pytest.raises(Interrupted):
        WRITERS[name](tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", WRITERS)
def test_an_interrupted_first_writer_leaves_nothing(name: str, tmp_path: Path, interrupt: Callable[[], None]) -> None:
    notebook(tmp_path)
    before = content(tmp_path)
    interrupt()
    with pytest.raises(Interrupted):
        WRITERS[name](tmp_path)
    assert content(tmp_path) == before


def test_an_interrupted_merge_leaves_no_folder(tmp_path: Path) -> None:
    for name in ("base", "model"):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / name / "model.safetensors")
    before = content(tmp_path)

    def rule(name: str, w0: torch.Tensor, ws: Any) -> torch.Tensor:
        if name == "b":
            raise Interrupted
        return arithmetic.average()(name, w0, ws)

    with pytest.raises(Interrupted):
        checkpoints.merge_checkpoints(tmp_path / "base", [tmp_path / "model"], rule, tmp_path / "out")
    assert content(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == {"base", "model"}


def test_replacing_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    replace_text(path, "é old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text(encoding="utf-8") == "é old" and part.parent == path.parent
    assert path.read_text() == "new"
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


# Writers that need no care, and why: what they write starts from nothing, or nobody else sees it.
FREE = {
    "tools/mutants.py": 1,
    "tools/new.py": 3,  # into a tree that has no such file
    "tools/redirects.py": 1,
    "tools/vendor.py": 3,
    "benchmarks/merging/bench_checkpoints.py": 3,
}  # fmt: skip


def test_no_other_function_writes_over_a_file() -> None:
    """Each call of a writer is inside a ``with replacing(...)``, or among those above."""
    writers = {"write_text", "write_bytes", "save_file", "savez", "savez_compressed", "to_csv", "to_json", "savefig"}
    bare: dict[str, list[str]] = {}
    for path in (p for p in SOURCES if p.parent.name != "examples"):  # whose user says where to
        tree = ast.parse(path.read_text(encoding="utf-8"))
        safe = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and "replacing(" in "".join(ast.unparse(i.context_expr) for i in node.items)
            for inner in ast.walk(node)
        }
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and id(n) not in safe]
        names = [ast.unparse(n.func) for n in calls]
        found = [n for n in names if n.split(".")[-1] in writers or n == "nbformat.write"]
        if found:
            bare[path.relative_to(ROOT).as_posix()] = found
    bare["peftref/plots/house.py"].remove("figure.savefig")  # into memory
    assert {path: len(found) for path, found in bare.items() if found} == FREE, bare


def test_records_of_mutants_are_replaced_whole(tmp_path: Path, interrupt: Callable[[], None]) -> None:
    """The tool's own run takes minutes; what it calls in the end is what is tried above."""
    tree = ast.parse(Path(mutants.__file__).read_text(encoding="utf-8"))
    assert "replace_text(root / RECORD" in ast.unparse(tree)
    path = tmp_path / "record.json"
    replace_text(path, json.dumps({"old": 1}))
    interrupt()
    with pytest.raises(Interrupted):
        replace_text(path, json.dumps({"new": np.pi}))
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]
