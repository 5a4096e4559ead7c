"""The package is typed: mypy, as strict as pyproject.toml asks, finds nothing in it, and would find a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def missing() -> list[str]:
    """What the check needs and is not installed."""
    absent = []
    for name in ("mypy", "pandas-stubs"):
        try:
            version(name)
        except PackageNotFoundError:
            absent.append(name)
    return absent


needs_mypy = pytest.mark.skipif(bool(missing()) and not os.environ.get("CI"), reason=f"not installed: {missing()}")


def check(*paths: Path) -> tuple[int, str]:
    """mypy with our settings: on the package, or on ``paths`` that use it; what it finds out is kept for the next."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


@needs_mypy
def test_the_package_is_typed() -> None:
    code, out = check()
    assert code == 0, out[-6000:]


USE = """from torch import nn, zeros
from peftref.tta import Tent, entropy

Tent(nn.BatchNorm1d(3), lr=0.1)
n: int = entropy(zeros(2, 3))
Tent(nn.BatchNorm1d(3), rate=0.1)
"""


@needs_mypy
def test_it_can_fail(tmp_path: Path) -> None:
    """So it does on a user's file, which shows too that users see our types, through the lazy names."""
    path = tmp_path / "uses.py"
    path.write_text(USE)
    code, out = check(path)
    assert code == 1 and "Found 2 errors" in out, out
    assert "Incompatible types in assignment" in out and 'Unexpected keyword argument "rate"' in out


def test_users_see_our_types() -> None:
    assert (files("peftref") / "py.typed").is_file()
