"""What keeps the project alive in public: workflows, container, Binder. The files are valid and mean what we say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def jobs(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))["jobs"]


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_follow_the_schema(path: Path) -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    command = str(tool) if tool.exists() else shutil.which("check-jsonschema")
    if command is None:
        pytest.skip("check-jsonschema is not installed")
    run = [command, "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_may_write_nothing_by_default_and_end(path: Path) -> None:
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    for name, job in flow["jobs"].items():
        assert job.get("timeout-minutes", 0) <= 120, name
        if "pytest" in commands(job) or ".ci/run" in commands(job):
            assert "timeout-minutes" in job, name


def test_the_oldest_and_the_newest_are_tested() -> None:
    matrix = jobs("test")["range"]["strategy"]["matrix"]["include"]
    oldest = re.search(r'^requires-python = ">=(.+)"$', PYPROJECT, re.M)
    torch = re.search(r'^    "torch>=(.+)",$', PYPROJECT, re.M)
    assert oldest and torch
    assert matrix[0] == {"python": oldest[1], "torch": f"torch=={torch[1]}.*"}
    assert matrix[-1]["torch"] == "torch", "the newest that there is"
    assert ".ci/run" in commands(jobs("test")["locked"]) and ".ci/run" in commands(jobs("publish")["build"])


def test_container_and_binder_take_the_lock() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert "make .venv/.stamp" in container["postCreateCommand"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["dependencies"][-1]["pip"] == ["-r requirements.lock", "-e ."]
