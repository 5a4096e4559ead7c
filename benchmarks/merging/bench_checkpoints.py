"""Merging checkpoints on disk against mergekit, and against the time that reading and writing the bytes takes.

Task arithmetic of a base and two models of 201 million parameters, as a user would run it: files in,
files out. ``python -m benchmarks.merging.bench_checkpoints ours FOLDER`` is one side in a process of its own, whose
resident memory is then the side's alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.graph import Executor
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, SimpleLoaderCache, plan_flat_merge
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks._timing import Row, bytes_floor, compare
from peftref.merging.baselines.arithmetic import task_arithmetic
from peftref.merging.baselines.ties import ties
from peftref.merging.core.checkpoints import SINGLE, merge_checkpoints
from peftref.merging.core.loop import merge

PEER = f"mergekit {version('mergekit')}"
MODELS, SCALES = ("a", "b"), (0.4, 0.4)
BLOCKS, WIDTH = 16, 1024  # 16 x 12 x 1024^2 = 201 M, the matrices of a transformer
CHUNK = 1 << 24


def write_checkpoints(folder: Path, dtype: torch.dtype) -> None:
    """Base and models: a matrix of normal numbers, and small steps away from it."""
    g = torch.Generator().manual_seed(0)
    shapes = {"attention.qkv": (3 * WIDTH, WIDTH), "attention.out": (WIDTH, WIDTH), "mlp.up": (4 * WIDTH, WIDTH),
              "mlp.down": (WIDTH, 4 * WIDTH)}  # fmt: skip
    noise = {k: 0.02 * torch.randn(s, generator=g) for k, s in shapes.items()}
    for step, model in enumerate(("base", *MODELS)):
        (folder / model).mkdir()
        tensors = {
            f"{i}.{k}": (v * (1 + 0.1 * step * (-1) ** i)).to(dtype) for i in range(BLOCKS) for k, v in noise.items()
        }
        save_file(tensors, folder / model / SINGLE)


def ours(folder: Path) -> None:
    shutil.rmtree(folder / "ours", ignore_errors=True)
    merge_checkpoints(folder / "base", [folder / m for m in MODELS], task_arithmetic(SCALES), folder / "ours")


def peer(folder: Path) -> None:
    shutil.rmtree(folder / "peer", ignore_errors=True)
    SimpleLoaderCache().loaders = {}
    config = RawPyTorchMergeConfig(
        merge_method="task_arithmetic", base_model=str(folder / "base" / SINGLE), dtype="float32",
        out_dtype=json.loads((folder / "dtype").read_text()),
        models=[{"model": str(folder / "base" / SINGLE)}]
        + [{"model": str(folder / m / SINGLE), "parameters": {"weight": SCALES[i]}} for i, m in enumerate(MODELS)],
    )  # fmt: skip
    tasks = plan_flat_merge(config, str(folder / "peer"), False, False, MergeOptions(quiet=True))
    Executor(tasks, math_device="cpu", storage_device="cpu").execute()


def bytes_alone(folder: Path) -> None:
    """Read every file, write as many bytes as the result has."""
    buffer = bytearray(CHUNK)
    for model in ("base", *MODELS):
        for file in (folder / model).glob("*.safetensors"):
            with file.open("rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass
    (folder / "bytes").mkdir(exist_ok=True)
    for file in (folder / "base").glob("*.safetensors"):
        rest = file.stat().st_size
        with (folder / "bytes" / file.name).open("wb", buffering=0) as f:
            while rest > 0:
                rest -= f.write(memoryview(buffer)[: min(rest, CHUNK)])


SIDES: dict[str, Callable[[Path], None]] = {"ours": ours, "peer": peer, "bytes": bytes_alone}


def resident_mb(side: str, folder: Path) -> float:
    """Peak of the resident memory that a side adds to a process which has imported everything, in 10^6 bytes."""
    command = [sys.executable, "-m", "benchmarks.merging.bench_checkpoints", side, str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _load(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def on_disk(dtype: torch.dtype) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoints(folder, dtype)
        (folder / "dtype").write_text(json.dumps(str(dtype).removeprefix("torch.")))
        ours(folder), peer(folder)
        got, expected = _load(folder / "ours"), _load(folder / "peer")
        assert got.keys() == expected.keys()
        for key, value in expected.items():  # one unit in the last place: sums in another order
            torch.testing.assert_close(got[key], value, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
        del got, expected, value
        kind = str(dtype).removeprefix("torch.")
        rows = [
            compare(f"task arithmetic, 3 checkpoints of 201 M, {kind}", lambda: ours(folder), lambda: peer(folder),
                    peer_name=PEER, target=2.0, warmup=1, repeats=5),
            compare(f"the same, {kind}: against its bytes read and written", lambda: ours(folder),
                    lambda: bytes_alone(folder), peer_name="read and write, nothing else", target=0.67, warmup=1,
                    repeats=5),
        ]  # fmt: skip
        memory = {side: resident_mb(side, folder) for side in SIDES}
        for row, other in zip(rows, ("peer", "bytes"), strict=True):
            row["ours_peak_mb"], row["peer_peak_mb"] = memory["ours"], memory[other]
    return rows


def in_memory() -> list[Row]:
    g = torch.Generator().manual_seed(0)
    base = {f"{i}.w": torch.randn(WIDTH, 4 * WIDTH, generator=g) for i in range(6)}  # 25 M parameters
    models = [{k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in base.items()} for _ in range(3)]
    everyone = {"base": base, **{str(i): m for i, m in enumerate(models)}}
    rows = []
    for name, rule, parameters in (
        ("task_arithmetic", task_arithmetic(0.3), {"weight": 1.0, "lambda": 0.3, "normalize": False}),
        ("ties", ties(0.2, elect="weighted"), {"weight": 1.0, "density": 0.2, "normalize": True}),
    ):

        def run_ours(rule=rule) -> dict[str, Tensor]:
            return merge(base, models, rule)

        @torch.no_grad()
        def run_peer(name=name, parameters=parameters) -> dict[str, Tensor]:
            return merge_state_dicts(everyone, name, base="base", parameters=parameters)

        got, expected = run_ours(), run_peer()
        for key, value in expected.items():
            different = ((got[key] - value).abs() > 1e-5).float().mean()  # of equal magnitudes mergekit keeps some
            assert different < 1e-5, f"{name} {key}: {different}"
        least = bytes_floor(5 * sum(t.nbytes for t in base.values()))  # base and three models read, one written
        claim = f"{name}, 3 models of 25 M in memory"
        rows.append(compare(claim, run_ours, run_peer, peer_name=PEER, floor=least, repeats=3))
    return rows


def rows() -> list[Row]:
    return [*on_disk(torch.float32), *on_disk(torch.bfloat16), *in_memory()]


def _peak(side: str, folder: Path) -> float:
    def kilobytes(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    SIDES[side](folder)
    return (kilobytes("VmHWM") - before) * 1024 / 1e6


if __name__ == "__main__":
    print(_peak(sys.argv[1], Path(sys.argv[2])))
