"""ruff finds nothing in the repository, notebooks included, and would find a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_ruff = pytest.mark.skipif(find_spec("ruff") is None and not os.environ.get("CI"), reason="ruff is not installed")


def check(path: Path) -> tuple[int, str]:
    """ruff with our settings."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


@needs_ruff
def test_the_repository_is_clean() -> None:
    code, out = check(ROOT)
    assert code == 0, out[-6000:]


@needs_ruff
def test_it_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(f"import os\n\nx = {'1 + ' * 40}1\n", encoding="utf-8")
    code, out = check(path)
    assert code == 1 and "E501" in out and "F401" in out, out
