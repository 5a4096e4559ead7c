"""The examples for several processes: many give what one gives, and the page shows the files that are tested."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from distributed import LocalCluster, get_worker
from safetensors.torch import load_file
from torch.testing import assert_close

from peftref.panel.experiments.dgp import Simulated
from peftref.panel.experiments.study import monte_carlo

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # a worker looks its functions up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The training script, to be called as the only process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # gloo, whatever the machine has
    store = dist.FileStore(str(tmp_path / "store"), 1)
    start = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda backend: start(backend, store=store, rank=0, world_size=1))
    yield example("lora_ddp")
    if dist.is_initialized():
        dist.destroy_process_group()


def test_two_processes_give_what_one_gives(
    alone: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "examples/lora_ddp.py"), "--out", str(tmp_path / "2")]
    command += ["--steps", "5", "--batch-size", "8", "--lr", "1e-2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu, 5 steps: last loss" in done.stdout

    alone.main(tmp_path / "1", steps=5, batch_size=8, lr=1e-2)
    said = capsys.readouterr().out
    assert "1 processes on cpu, 5 steps: last loss" in said and said.split()[-1] == done.stdout.split()[-1]
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "12")
    assert one.keys() == two.keys() and any("lora_B" in name and t.abs().max() > 1e-3 for name, t in one.items())
    for name, t in one.items():  # 5 steps of AdamW divide by gradients of any size: rounding shows at 1e-4 of a step
        assert_close(two[name], t, rtol=0, atol=1e-4, msg=name)


def test_a_batch_that_cannot_be_shared_is_refused(
    alone: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 2 processes, got 7"):
        alone.main(tmp_path / "none", steps=1, batch_size=7, lr=1e-2)
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster with two workers."""
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address


def test_a_cluster_gives_what_one_process_gives(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = example("study_dask")
    plain = monte_carlo(study.simulate, study.ESTIMATORS, range(5))

    def in_a_worker(seeds: list[int], simulate=study.simulate) -> Simulated:  # noqa: ANN001
        get_worker()  # an error elsewhere
        return simulate(seeds=seeds)

    monkeypatch.setattr(study, "simulate", in_a_worker)
    table = study.main(scheduler, 5, 2, tmp_path / "study.csv")
    said = capsys.readouterr().out
    assert "5 datasets on 2 workers" in said and all(name in said for name in study.ESTIMATORS)
    pd.testing.assert_frame_equal(table, plain, rtol=1e-12)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "study.csv", index_col="seed"), plain, rtol=1e-9)
    with pytest.raises(ValueError, match="worker"):  # what shows that it was the cluster
        monte_carlo(in_a_worker, study.ESTIMATORS, [0])
    with pytest.raises(ValueError, match="datasets: expected at least 1, got 0"):
        study.main(scheduler, 0, 2, None)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_the_page_includes_the_file(name: str) -> None:
    page = (ROOT / "book/beyond.md").read_text(encoding="utf-8")
    assert f"```{{literalinclude}} ../examples/{name}\n" in page
