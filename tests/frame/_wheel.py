"""The wheel of this tree, and notebooks run by another Python; for the tests of what users install."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient

from tools.mutants import copy_tree

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, root: Path = ROOT) -> Path:
    """Build the wheel from a copy: setuptools leaves files behind, and would pack what an earlier build left."""
    with tempfile.TemporaryDirectory() as copy:
        copy_tree(Path(copy), root)
        command = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), copy]
        pip(sys.executable, *command)
    (wheel,) = folder.glob("peftref-*.whl")
    return wheel


def pip(python: str | Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    """``python -m pip``; what it says if it fails, else its standard output."""
    return run(python, "-m", "pip", *arguments, env=env)


def run(python: str | Path, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """A command of some Python, without our tree on its path; its standard output.

    Raises:
        AssertionError: it fails; with what it said.
    """
    done = subprocess.run(
        [str(python), *arguments], cwd=cwd or tempfile.gettempdir(), env=clean(env), text=True, capture_output=True
    )
    assert done.returncode == 0, f"{' '.join(map(str, done.args))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def clean(more: dict[str, str] | None = None) -> dict[str, str]:
    """Our environment variables, without those that lead to this tree or choose what a chapter does."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PEFTREF_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | (more or {})


class Elsewhere(AsyncKernelManager):
    """A kernel in another Python."""

    python = sys.executable

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(
    nb: nbformat.NotebookNode, python: str | Path, folder: Path, env: dict[str, str] | None = None, timeout: int = 900
) -> None:
    """Execute a notebook in a folder by another Python; its outputs stay in ``nb``. The first error is raised."""
    manager = type("Manager", (Elsewhere,), {"python": python})
    quiet = ["--IPKernelApp.log_level=ERROR"]
    client = NotebookClient(nb, kernel_manager_class=manager, timeout=timeout, extra_arguments=quiet)
    client.execute(cwd=str(folder), env=clean(env))
