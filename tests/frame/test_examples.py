"""The example for several processes: two give what one gives, and the page shows the file that is tested."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[2]


def run(processes: int, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(ROOT / "examples/lora_ddp.py"), "--out", str(out), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # gloo, whatever the machine has
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    weights = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = run(processes, out, "--steps", "5", "--batch-size", "8", "--lr", "1e-2")
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{processes} processes on cpu, 5 steps: last loss" in done.stdout
        weights.append(load_file(out / "adapter_model.safetensors"))
    one, two = weights
    assert one.keys() == two.keys() and any("lora_B" in name and t.abs().max() > 1e-3 for name, t in one.items())
    for name, t in one.items():  # 5 steps of AdamW divide by gradients of any size: rounding shows at 1e-4 of a step
        assert_close(two[name], t, rtol=0, atol=1e-4, msg=name)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    done = run(2, tmp_path / "none", "--steps", "1", "--batch-size", "7")
    assert done.returncode != 0 and "expected a multiple of the 2 processes, got 7" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["examples/lora_ddp.py"])
def test_the_page_includes_the_file(name: str) -> None:
    assert f"../{name}" in (ROOT / "book/beyond.md").read_text(encoding="utf-8")
