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
        writes = {k for k, v in job.get("permissions", {}).items() if v == "write"}
        assert len(writes) <= 2, name
        if "pytest" in commands(job) or ".ci/run" in commands(job):
            assert job["timeout-minutes"] <= 120, name
        for step in job["steps"]:
            assert re.search(r"@(v\d+|release/v1)$", step.get("uses", "@v1")), step
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_the_oldest_and_the_newest_are_tested() -> None:
    matrix = jobs("test")["range"]["strategy"]["matrix"]["include"]
    oldest = re.search(r'^requires-python = ">=(.+)"$', PYPROJECT, re.M)
    torch = re.search(r'^    "torch>=(.+)",$', PYPROJECT, re.M)
    assert oldest and torch
    assert matrix[0] == {"python": oldest[1], "torch": f"torch=={torch[1]}.*"}
    assert matrix[-1]["torch"] == "torch", "the newest that there is"
    assert ".ci/run" in commands(jobs("test")["locked"]) and ".ci/run" in commands(jobs("publish")["build"])


def test_every_part_is_in_the_runs_without_the_lock() -> None:
    parts = {p.parent.name for p in (ROOT / "tests").glob("*/test_*.py")} - {"frame"}
    parts |= {p.stem for p in (ROOT / "tests").glob("test_*.py")}
    for job in (jobs("test")["range"], jobs("weekly")["nightly"]):
        assert set(re.findall(r"tests/(\w+)", commands(job))) == parts and commands(job).rstrip().endswith(" peftref")


def test_the_weekly_run_starts_cold_and_reports() -> None:
    weekly = jobs("weekly")
    assert "colab-images" in weekly["colab"]["env"]["IMAGE"] and "cache" not in json.dumps(weekly)
    assert "diff before after" in commands(weekly["colab"])
    assert "gh label create weekly" in commands(weekly["report"])
    assert set(weekly["report"]["needs"]) == {*weekly} - {"report"} and weekly["report"]["if"] == "failure()"


def test_container_and_binder_take_the_lock() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert container["postCreateCommand"].endswith("chromium libgl1 && make .venv/.stamp")
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["dependencies"][-1]["pip"] == ["-r requirements.lock", "-e ."]
