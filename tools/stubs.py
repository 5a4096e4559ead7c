"""Write the public names of each package: ``peftref/<package>/__init__.pyi``, from the ``__all__`` of its modules.

The stub is read twice: by editors and mypy, and, through ``lazy_loader``, by the package itself, which imports a module
when one of its names is first used. So ``from peftref.tta import LAME`` loads LAME and nothing else::

    python -m tools.stubs          # write what differs
    python -m tools.stubs --check  # only name it; exit code 1 if there is any
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from peftref._replacing import replace_text
from peftref.catalog import METHODS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("data", "models", "plots")  # packages that belong to no part
# Modules that a package shows by themselves: ``from peftref.data import streams``.
MODULES = {"data": ("corruptions", "orders", "streams")}
# Experiments that several chapters share; those of one chapter stay in their modules.
EXPERIMENTS = {"colournets", "corrupted", "dgp", "evaluate", "multicolor", "multitask", "spurious", "study", "transfer"}
HEAD = "# ruff: noqa: I001\n# Written by `python -m tools.stubs` from the `__all__` of the modules.\n"


def packages(root: Path = ROOT) -> list[Path]:
    """Every package whose names are public: the parts and the shared ones."""
    parts = dict.fromkeys(method.part for method in METHODS)
    folders = [root / "peftref" / name for name in (*parts, *SHARED)]
    return [folder for folder in folders if (folder / "__init__.py").is_file()]


def names(path: Path) -> list[str]:
    """``__all__`` of a module, read without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return sorted(ast.literal_eval(node.value))
    return []


def is_public(path: Path) -> bool:
    """Scripts and private modules show nothing, nor do the experiments of one chapter."""
    if path.parent.name == "experiments":
        return path.stem in EXPERIMENTS
    return not path.stem.startswith(("_", "make_"))


def stub(folder: Path) -> str:
    """The text of a package's stub.

    Raises:
        ValueError: two of its modules export the same name, or a name is also that of a module beside the package.
    """
    found: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        if path.name == "__init__.py" or not is_public(path) or not names(path):
            continue
        found[module] = names(path)
        for name in found[module]:
            if name in owner:
                raise ValueError(f"{folder.name}: both {owner[name]} and {module} export {name!r}")
            if (folder / f"{name}.py").is_file() or (folder / name).is_dir():
                raise ValueError(f"{folder.name}: {module} exports {name!r}, the name of a module of the package")
            owner[name] = module
    lines = [f"from . import {name} as {name}" for name in MODULES.get(folder.name, ())]
    for module, exported in found.items():
        lines += [f"from .{module} import {name} as {name}" for name in exported]
    every = sorted([*owner, *MODULES.get(folder.name, ())])
    listed = "".join(f'    "{name}",\n' for name in every)
    return HEAD + "\n".join(lines) + f"\n\n__all__ = [\n{listed}]\n"


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write the stubs that differ; with ``--check`` only name them and return 1."""
    stale = {}
    for folder in packages(root):
        path, text = folder / "__init__.pyi", stub(folder)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale[path] = text
    for path, text in stale.items():
        if "--check" in arguments:
            print(f"{path.relative_to(root)} is out of date: run python -m tools.stubs")
        else:
            replace_text(path, text)
            print(f"wrote {path.relative_to(root)}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
