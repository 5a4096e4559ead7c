"""Checkpoints on disk: the same numbers as in memory, the base's layout, little memory, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftref.merging.baselines.arithmetic import average, dare, task_arithmetic, wise_ft
from peftref.merging.baselines.ties import ties, trim_thresholds
from peftref.merging.core import checkpoints
from peftref.merging.core.checkpoints import INDEX, SINGLE, Checkpoint, merge_checkpoints
from peftref.merging.core.loop import Rule, merge


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed": (50, 8), "a.weight": (16, 8), "a.bias": (16,), "norm.scale": (), "none": (0, 3), "z": (7, 3)}
    made = {k: torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()}
    return {**made, "a.steps": torch.tensor([seed]), "mask": torch.tensor([True, seed > 0])}


def save_sharded(tensors: dict[str, Tensor], folder: Path, shards: int) -> None:
    folder.mkdir()
    names = list(tensors)
    files = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[list[dict[str, Tensor]], list[Path]]:
    """A base of two shards, a model of three, a folder with one file, one file alone."""
    states = [state(s) for s in range(4)]
    paths = [tmp_path / name for name in ("base", "three", "folder", "alone.safetensors")]
    save_sharded(states[0], paths[0], 2)
    save_sharded(states[1], paths[1], 3)
    paths[2].mkdir()
    save_file(states[2], paths[2] / SINGLE)
    save_file(states[3], paths[3])
    return states, paths


def load(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_checkpoint_is_a_state_dict(saved: tuple) -> None:
    for expected, path in zip(*saved, strict=True):
        opened = Checkpoint(path)
        assert set(opened) == set(expected) and len(opened) == len(expected) and "nowhere" not in opened
        for name, value in expected.items():
            assert torch.equal(opened[name], value) and opened[name].dtype == value.dtype
            assert opened.layout[name].shape == value.shape and opened.layout[name].dtype == value.dtype
        with pytest.raises(KeyError):
            opened["nowhere"]


RULES = {
    "wise_ft": (wise_ft(0.3), 1),
    "task_arithmetic": (task_arithmetic([0.5, -0.2, 0.4]), 3),
    "average": (average(), 3),
    "ties": (ties(0.4), 3),
    "dare": (dare(0.5, task_arithmetic(0.4)), 2),
}


@pytest.mark.parametrize("name", RULES)
def test_files_and_memory_give_the_same_bits(saved: tuple, tmp_path: Path, name: str) -> None:
    (rule, n), (states, paths) = RULES[name], saved
    out = merge_checkpoints(paths[0], paths[1 : n + 1], rule, tmp_path / "deep" / "out")
    expected = merge(states[0], states[1 : n + 1], rule)
    got = load(out)
    assert set(got) == set(expected)
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_types_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    states = [state(0, dtype), state(1)]
    for i, s in enumerate(states):
        save_file(s, tmp_path / f"{i}.safetensors")
    merge_checkpoints(tmp_path / "0.safetensors", [tmp_path / "1.safetensors"], wise_ft(0.25), tmp_path / "out")
    expected = merge(states[0], states[1:], wise_ft(0.25))
    for name, value in load(tmp_path / "out").items():
        assert value.dtype == expected[name].dtype and torch.equal(value.double(), expected[name].double())


def test_layout_of_the_base_is_kept(saved: tuple, tmp_path: Path) -> None:
    _, (base, three, folder, alone) = saved
    out = merge_checkpoints(base, [three], average(), tmp_path / "out")
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in base.iterdir())
    assert (out / INDEX).read_text() == (base / INDEX).read_text()
    for file in base.glob("*.safetensors"):
        size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        written = (out / file.name).read_bytes()
        assert written[:size] == file.read_bytes()[:size] and len(written) == file.stat().st_size
    assert out.stat().st_mode == base.stat().st_mode
    single = merge_checkpoints(alone, [folder], average(), tmp_path / "single")
    assert [f.name for f in single.iterdir()] == [SINGLE]
    # What was written can be read again, by us and by the library.
    assert set(Checkpoint(single)) == set(load_file(single / SINGLE))


def test_identity_of_the_base_is_byte_for_byte(saved: tuple, tmp_path: Path) -> None:
    _, (base, *_) = saved
    out = merge_checkpoints(base, [base, base], task_arithmetic(0.3), tmp_path / "out")
    assert all((out / f.name).read_bytes() == f.read_bytes() for f in base.iterdir())


def test_skipped_heads_of_other_shape(saved: tuple, tmp_path: Path) -> None:
    states, (base, *_) = saved
    other = {**states[1], "z": torch.zeros(2, 3)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"shapes: z \(2, 3\) for \(7, 3\)"):
        merge_checkpoints(base, [tmp_path / "other.safetensors"], average(), tmp_path / "out")
    out = merge_checkpoints(base, [tmp_path / "other.safetensors"], average(), tmp_path / "out", skip=["z"])
    assert torch.equal(load(out)["z"], states[0]["z"]) and torch.equal(load(out)["embed"], other["embed"])


def test_thresholds_of_checkpoints(saved: tuple) -> None:
    states, paths = saved
    opened = [Checkpoint(p) for p in paths]
    assert trim_thresholds(opened[0], opened[1:], 0.3) == trim_thresholds(states[0], states[1:], 0.3)


@pytest.mark.parametrize("moment", ["rule", "interrupt", "mismatch"])
def test_nothing_is_left_of_a_merge_that_fails(saved: tuple, tmp_path: Path, moment: str) -> None:
    _, (base, three, *_) = saved
    before = sorted(tmp_path.rglob("*"))

    def rule(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        if name == "a.bias":
            raise KeyboardInterrupt if moment == "interrupt" else RuntimeError("rule failed")
        return w0

    if moment == "mismatch":
        save_file({"embed": torch.zeros(1)}, three / "model-00001-of-00003.safetensors")
    with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)):
        merge_checkpoints(base, [three], rule, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_paths_and_files(saved: tuple, tmp_path: Path) -> None:
    _, (base, three, folder, alone) = saved
    rule: Rule = average()
    with pytest.raises(FileNotFoundError, match="path: expected safetensors, found no .*nowhere"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=SINGLE):
        Checkpoint(tmp_path)
    with pytest.raises(FileExistsError, match="out: expected a folder that does not exist yet"):
        merge_checkpoints(base, [three], rule, folder)
    with pytest.raises(TypeError, match="models: expected a sequence of paths, got the path"):
        merge_checkpoints(base, alone, rule, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="models: expected at least one"):
        merge_checkpoints(base, [], rule, tmp_path / "out")

    def broken(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    header = json.dumps({"w": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for content, text in (
        (b"", "expected a safetensors file"),
        (alone.read_bytes()[:40], "expected a safetensors file"),  # cut in its header
        (pickle.dumps({"w": 1}), "expected a safetensors file"),
        (len(header).to_bytes(8, "little") + header + b"1234", "expected types among .* got F3"),
        (len(b"[1, 2]").to_bytes(8, "little") + b"[1, 2]", "expected a safetensors file"),
    ):
        with pytest.raises(ValueError, match=text):
            Checkpoint(broken("broken.safetensors", content))
    cut = broken("cut.safetensors", alone.read_bytes()[:-10])  # a download that stopped
    with pytest.raises(ValueError, match="expected .* bytes"):
        Checkpoint(cut)
    index = json.loads((three / INDEX).read_text())
    index["weight_map"]["extra"] = "model-00001-of-00003.safetensors"
    (three / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="and its index differ in .*extra"):
        Checkpoint(three)
    (three / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        Checkpoint(three)


def test_an_index_cannot_point_outside_its_folder(saved: tuple, tmp_path: Path) -> None:
    _, (base, *_) = saved
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../alone.safetensors")
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError):
        Checkpoint(base)


def test_files_are_opened_anew_before_too_much_of_them_is_held(saved: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (_, _, _, alone) = saved
    opened = []
    monkeypatch.setattr(checkpoints, "safe_open", lambda f, framework: opened.append(f) or Real(f, framework))
    monkeypatch.setattr(checkpoints, "WINDOW", 700)
    state = Checkpoint(alone)
    sizes = [state[name].nbytes for name in state]
    held, expected = 0, 0
    for size in sizes:
        if expected == 0 or held + size > 700:
            held, expected = 0, expected + 1
        held += size
    assert len(opened) == expected > 2


Real = checkpoints.safe_open

SCRIPT = """
import sys
from pathlib import Path
import torch
from peftref.merging.baselines.arithmetic import task_arithmetic
from peftref.merging.core.checkpoints import merge_checkpoints
def kilobytes(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key + ":")).split()[1])
folder = Path(sys.argv[1])
torch.set_num_threads(1)
merge_checkpoints(folder / "small", [folder / "small"], task_arithmetic(1.0), folder / "warm")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kilobytes("VmRSS")
merge_checkpoints(folder / "base", [folder / "a", folder / "b"], task_arithmetic([0.5, 0.5]), folder / "out")
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux' account of a process")
def test_merges_checkpoints_several_times_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    tensors, side, megabyte = 24, 1024, 2**20  # 96 MiB each, 288 MiB to read
    for name, value in (("base", 1.0), ("a", 2.0), ("b", 4.0)):
        save_sharded({f"w{i}": torch.full((side, side), value + i) for i in range(tensors)}, tmp_path / name, 3)
    save_sharded({"w": torch.ones(2)}, tmp_path / "small", 1)
    script = f"import peftref.merging.core.checkpoints as c; c.WINDOW = {8 * megabyte}\n" + SCRIPT
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra = int(done.stdout) * 1024
    # Of each of the three files a window, beside it a tensor of each, the result, and what Python adds.
    assert extra < 60 * megabyte, extra / megabyte
    assert 3 * tensors * side * side * 4 > 4.5 * 60 * megabyte
    merged = load(tmp_path / "out")
    assert all(torch.equal(merged[f"w{i}"], torch.full((side, side), 3.0 + i)) for i in range(tensors))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is reserved where the system can")
def test_a_full_disk_is_noticed_before_anything_is_computed(
    saved: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (base, three, *_) = saved
    before = sorted(tmp_path.rglob("*"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def never(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        raise AssertionError("computed before the space was there")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        merge_checkpoints(base, [three], never, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_without_reserved_space_the_file_is_the_same(
    saved: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (base, three, *_) = saved
    expected = load(merge_checkpoints(base, [three], average(), tmp_path / "reserved"))
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    got = load(merge_checkpoints(base, [three], average(), tmp_path / "sparse"))
    assert all(torch.equal(got[k], v) for k, v in expected.items())
