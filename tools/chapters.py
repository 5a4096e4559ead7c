"""Execute chapters in place, and know which of them are stale.

An executed chapter carries in its metadata the SHA-256 of its code cells, of every ``peftref`` module it imported, of
the data files beside those modules and of the records that it reads. It is stale when any of these has changed::

    python -m tools.chapters tta/lame          # execute one chapter
    python -m tools.chapters --stale --jobs 2  # execute what has changed, two at a time
    python -m tools.chapters --check           # only name the stale ones; exit code 1 if there are any

An execution writes down what it took, for the page of the book's state and for the budget of a chapter.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm
from traitlets import default

from peftref._replacing import replace_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "peftref"
DATA = {".npz", ".safetensors"}
WIDGETS = "application/vnd.jupyter.widget-state+json"
# Runs in the kernel after the last cell and is not kept: which modules did the chapter really import, and from where?
ASK = f"""import json, sys
print(json.dumps({{n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "{PACKAGE}" and m.__file__}}))"""
# And after that: on what machine, how many seconds of the processor, how much memory? (A toy package cannot tell.)
COST = f"""
try:
    from {PACKAGE}.recording import run
except ImportError:
    run = dict
print(json.dumps(run()))"""
STATUS = "book/_results/status.json"


class ThisPython(AsyncKernelManager):
    """A kernel in this very interpreter, whatever kernels the user has installed under the same name."""

    @default("kernel_spec_manager")
    def _no_kernel_folders(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def chapters(root: Path = ROOT) -> list[Path]:
    """Every notebook of the book."""
    return sorted(p for p in (root / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def sha256(data: bytes | Path) -> str:
    """Hash of some bytes or of a file; of nothing where the file is gone, so that a removed file counts as changed."""
    if isinstance(data, Path):
        data = data.read_bytes() if data.is_file() else b""
    return hashlib.sha256(data).hexdigest()


def module_file(root: Path, name: str) -> Path:
    """The file of a module or package of this tree."""
    path = root.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def records(root: Path, nb: nbformat.NotebookNode) -> set[Path]:
    """The records that a chapter reads by ``recorded("tta/lame")``."""
    code = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    files = {root / PACKAGE / "recorded" / f"{slug}.json" for slug in re.findall(r"recorded\(\s*\"\w+/(\w+)\"", code)}
    return {file for file in files if file.is_file()}


def inputs(root: Path, nb: nbformat.NotebookNode, modules: Iterable[str]) -> set[str]:
    """Files that a chapter depends on besides code: data in the packages it imported, and the records it reads."""
    packages = {module_file(root, name).parent for name in modules}
    data = {f for f in (root / PACKAGE).rglob("*") if f.suffix in DATA}
    # A folder without code belongs to the package around it.
    data = {f for f in data if next(p for p in f.parents if (p / "__init__.py").is_file()) in packages}
    return {f.relative_to(root).as_posix() for f in data | records(root, nb)}


def fingerprint(root: Path, nb: nbformat.NotebookNode, modules: Iterable[str], data: Iterable[str]) -> dict:
    """What the outputs of a chapter were made from."""
    code = "\0".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    return {
        "cells": sha256(code.encode()),
        "data": {name: sha256(root / name) for name in sorted(data)},
        "modules": {name: sha256(module_file(root, name)) for name in sorted(modules)},
    }


def is_stale(path: Path, root: Path = ROOT) -> bool:
    """Whether a chapter must be executed again (never executed counts)."""
    nb = nbformat.read(path, as_version=4)
    saved = nb.metadata.get(PACKAGE)
    if saved is None:
        return True
    # A new record of this chapter is an input too; a new data file of some other method is not.
    data = set(saved["data"]) | inputs(root, nb, ())
    return saved != fingerprint(root, nb, saved["modules"], data)


def stale(root: Path = ROOT) -> list[Path]:
    """The chapters whose outputs are older than their code cells, modules, data or records."""
    return [path for path in chapters(root) if is_stale(path, root)]


def tidy(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out all that differs between two executions of the same chapter, so that a re-execution is a small diff."""
    seen: dict[str, int] = {}
    for cell in nb.cells:
        digest = sha256(f"{cell.cell_type}\n{cell.source}".encode())[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata.pop("execution", None)  # timestamps
    language = nb.metadata.get("language_info", {})
    nb.metadata.language_info = {k: v for k, v in language.items() if k in ("name", "file_extension", "pygments_lexer")}
    nb.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    text = re.sub(r" at 0x[0-9a-f]{6,}", "", json.dumps(nb))
    # Widgets are named by random 128-bit ids: number them in the order in which they were made.
    for i, model in enumerate(nb.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})):
        text = text.replace(model, hashlib.md5(f"widget {i}".encode()).hexdigest())
    return nbformat.from_dict(json.loads(text))


async def execute(
    path: Path, root: Path = ROOT, *, timeout: int = 600, tick: Callable[..., object] | None = None
) -> None:
    """Execute a notebook in place, and :func:`note` its cost. If a cell raises, the file stays as it was.

    Raises:
        CellExecutionError: A cell raised; the message shows the cell and the traceback.
        RuntimeError: The notebook imported the package from another tree.
    """
    nb = nbformat.read(path, as_version=4)
    nb.metadata.pop("widgets", None)
    nb.cells.append(nbformat.v4.new_code_cell(ASK + COST))
    client = NotebookClient(
        nb,
        kernel_name="python3",
        kernel_manager_class=ThisPython,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        timeout=timeout,
        store_widget_state=True,
        coalesce_streams=True,
        record_timing=False,
    )
    if tick is not None:
        client.on_cell_executed = tick
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread: the products of a chapter are small, and threads would mostly wait for each other.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    await client.async_execute(cwd=str(path.parent), env=env)
    answer = "".join(out.text for out in nb.cells.pop().outputs if out.get("name") == "stdout")
    modules, cost = map(json.loads, answer.splitlines())
    for name, file in modules.items():
        if Path(file).resolve() != module_file(root, name).resolve():
            raise RuntimeError(f"{path}: {name} was imported from {file}, expected it under {root}")
    nb.metadata[PACKAGE] = fingerprint(root, nb, modules, inputs(root, nb, modules))
    replace_text(path, nbformat.writes(tidy(nb)) + "\n")
    note(path, cost, root)


def note(path: Path, cost: dict, root: Path = ROOT) -> None:
    """Write down what the execution of a chapter took; chapters that are gone are forgotten.

    Chapters that run at the same time do so in one process, and nothing is awaited between reading and writing.
    """
    file = root / STATUS
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known[path.relative_to(root / "book").with_suffix("").as_posix()] = cost
    known = {name: known[name] for name in sorted(known) if (root / f"book/{name}.ipynb").is_file()}
    replace_text(file, json.dumps(known, indent=1) + "\n")


async def execute_all(paths: list[Path], root: Path = ROOT, *, jobs: int = 1, timeout: int = 600) -> dict[Path, str]:
    """Execute notebooks, ``jobs`` at a time, under one progress bar; returns the error message of each that failed."""
    failed: dict[Path, str] = {}
    turn = asyncio.Semaphore(jobs)
    cells = sum(c.cell_type == "code" for p in paths for c in nbformat.read(p, as_version=4).cells) + len(paths)
    with tqdm(total=cells, unit="cell", desc=f"{len(paths)} chapter(s)", disable=not paths) as bar:

        async def one(path: Path) -> None:
            async with turn:
                bar.set_postfix_str(path.relative_to(root / "book").with_suffix("").as_posix())
                try:
                    await execute(path, root, timeout=timeout, tick=lambda **_: bar.update())
                except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error:
                    failed[path] = str(error)

        await asyncio.gather(*map(one, paths))
    return failed


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.chapters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="part/slug, for example tta/lame; default: all")
    parser.add_argument("--stale", action="store_true", help="execute only what has changed")
    parser.add_argument("--check", action="store_true", help="execute nothing, name the stale chapters")
    parser.add_argument("--jobs", type=int, default=1, help="chapters executed at the same time (default 1)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take (default 600)")
    args = parser.parse_args(argv)
    paths = [ROOT / "book" / f"{name.removesuffix('.ipynb')}.ipynb" for name in args.names] or chapters(ROOT)
    for path in paths:
        if not path.is_file():
            parser.error(f"NAME: expected a chapter such as tta/lame, but there is no {path}")
    if args.stale or args.check:
        paths = [path for path in paths if is_stale(path, ROOT)]
    if args.check:
        print("\n".join(f"stale: {path.relative_to(ROOT)}" for path in paths) or "all chapters are fresh")
        return bool(paths)
    failed = asyncio.run(execute_all(paths, ROOT, jobs=args.jobs, timeout=args.timeout))
    for path, message in failed.items():
        print(f"\n{path.relative_to(ROOT)} failed; the file is as it was.\n{message}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
