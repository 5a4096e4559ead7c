"""Files as others write them, change them and leave them behind: read, refused before a merge, or cleaned up."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftref import _replacing
from peftref._replacing import new_folder, replace_text, replacing
from peftref.merging.baselines.arithmetic import average, wise_ft
from peftref.merging.baselines.ties import ties, trim_thresholds
from peftref.merging.core import checkpoints
from peftref.merging.core.checkpoints import INDEX, SINGLE, Checkpoint, merge_checkpoints
from peftref.merging.core.loop import merge

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8"}


def written(path: Path, state: dict[str, Tensor], pad: int = 0, metadata: dict[str, str] | None = None) -> Path:
    """A file of safetensors whose header has any length: ``pad`` more than a multiple of 8."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, t in state.items():
        data = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(body), len(body) + len(data)]
        entries[name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
        body += data
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8 + pad)
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)
    return path


def sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    files = {name: f"model-{i:05d}.safetensors" for i, name in enumerate(state)}
    for name, file in files.items():
        save_file({name: state[name]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


# -- headers of any length


@pytest.mark.parametrize("pad", range(8))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_may_begin_anywhere(tmp_path: Path, pad: int, dtype: torch.dtype) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        made = {k: torch.randn(s, generator=g).to(dtype) for k, s in {"a": (5, 3), "none": (0, 2), "one": ()}.items()}
        return {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), **made, "last": torch.ones(1, dtype=dtype) * seed}

    base, model = state(1), state(2)
    paths = [written(tmp_path / "a.safetensors", base, pad), written(tmp_path / "b.safetensors", model, (3 * pad) % 8)]
    assert all(torch.equal(v, base[k]) for k, v in load_file(paths[0]).items())  # the library reads it
    opened = Checkpoint(paths[0])
    assert all(opened[k].data_ptr() % opened[k].element_size() == 0 for k in base)
    for i, rule in enumerate((wise_ft(0.25), ties(0.5))):
        got = load_file(merge_checkpoints(paths[0], [paths[1]], rule, tmp_path / f"out{i}") / SINGLE)
        wanted = merge(base, [model], rule)
        assert list(got) == list(load_file(paths[0])) and all(torch.equal(got[k], v) for k, v in wanted.items())
    assert trim_thresholds(opened, [Checkpoint(paths[1])], 0.3) == trim_thresholds(base, [model], 0.3)


@pytest.mark.parametrize("pad", [1, 4])
def test_the_header_is_kept_as_it_is(tmp_path: Path, pad: int) -> None:
    path = written(tmp_path / "a.safetensors", {"w": torch.ones(3)}, pad, {"format": "mlx", "é": "ü"})
    out = merge_checkpoints(path, [path], average(), tmp_path / "out")
    assert (out / SINGLE).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e["b"].update(data_offsets=[4, 12]), "one after the other, got b"),  # over another tensor
        (lambda e: e["a"].update(data_offsets=[0, 4]), "one after the other, got a"),
        (lambda e: e["a"].update(shape=[3]), "one after the other, got a"),
        (lambda e: e["a"].update(shape=None), "expected a safetensors file"),
        (lambda e: e["a"].update(data_offsets=3), "expected a safetensors file"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused_before_anything_is_read(tmp_path, change, said: str) -> None:
    entries = {k: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, k in enumerate("ab")}
    change(entries)
    head = json.dumps(entries).encode()
    path = tmp_path / "a.safetensors"
    size = max((e["data_offsets"][1] for e in entries.values() if e["data_offsets"] != 3), default=16)
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(size))
    with pytest.raises(ValueError, match=said):
        Checkpoint(path)


# -- which file is meant


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base", {"a": torch.ones(2), "b": torch.ones(3)})
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, folder / SINGLE)
    with pytest.raises(ValueError, match="path: expected model.safetensors or an index of shards, got both"):
        Checkpoint(folder)
    assert Checkpoint(folder / SINGLE)["a"].sum() == 0  # by its own name


def test_an_index_of_the_single_file_is_none_of_others(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"a": torch.ones(2)}, base / SINGLE)
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    out = merge_checkpoints(base, [base], average(), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in base.iterdir()}


@pytest.mark.parametrize("there", ["..", "/", "sub"])
def test_an_index_that_points_outside_is_not_read_as_something_else(tmp_path: Path, there: str) -> None:
    folder = sharded(tmp_path / "base", {"a": torch.ones(2)})
    name = "model-00000.safetensors"
    outside = {"..": f"../{name}", "/": str(tmp_path / name), "sub": f"sub/{name}"}
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00000.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": outside[there]}}))
    with pytest.raises(FileNotFoundError, match="an index of files beside it"):
        Checkpoint(folder)


NO_INDEX = ("", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}')


@pytest.mark.parametrize("text", NO_INDEX)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path / "base", {"a": torch.ones(2)})
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match="path: expected an index with a weight_map"):
        Checkpoint(folder)


def test_paths_that_are_none(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"w": torch.ones(3)})
    for models in (5, {"a": path}, iter([path])):
        with pytest.raises(TypeError, match="models: expected a sequence of paths"):
            merge_checkpoints(path, models, average(), tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path: expected the path of a checkpoint, got Tensor"):
        merge_checkpoints(path, [torch.ones(2)], average(), tmp_path / "out")  # type: ignore[list-item]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="out: expected a folder that does not exist yet"):
        merge_checkpoints(path, [path], average(), tmp_path / "link")


# -- files that change


@pytest.mark.parametrize("change", ["replaced", "written", "shorter", "gone"])
@pytest.mark.parametrize("which", ["base", "model", "shard"])
@pytest.mark.parametrize("window", [1 << 26, 1])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, change: str, which: str, window: int) -> None:
    state = {k: torch.full((64,), i + 1.0) for i, k in enumerate("abcd")}
    paths = {k: written(tmp_path / f"{k}.safetensors", state) for k in ("base", "model")}
    shards = sharded(tmp_path / "shard", state)
    monkeypatch.setattr(checkpoints, "WINDOW", window)
    file = paths.get(which, shards / "model-00003.safetensors")

    def rule(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        if name == "b":
            if change == "replaced":
                (tmp_path / "new").write_bytes(file.read_bytes())
                os.replace(tmp_path / "new", file)
            elif change == "gone":
                file.unlink()
            else:
                with file.open("r+b") as f:
                    f.truncate(100) if change == "shorter" else f.write(file.read_bytes())
                os.utime(file, ns=(1, 1))  # the clock of the file system may not have moved yet
        return w0

    with pytest.raises(ValueError, match="as it was when it was opened, got another or changed file"):
        merge_checkpoints(paths["base"], [paths["model"], shards], rule, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_file_that_changes_after_its_last_tensor_was_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"w": torch.ones(3)})

    def rule(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        os.utime(path, ns=(1, 1))
        return w0

    with pytest.raises(ValueError, match="got another or changed file"):
        merge_checkpoints(path, [path], rule, tmp_path / "out")


# -- what is left behind

SLOW = """
import sys, time
from pathlib import Path
from peftref.merging.core.checkpoints import merge_checkpoints
def rule(name, w0, ws):
    print("ready", flush=True)
    time.sleep(60)
merge_checkpoints(sys.argv[1], [sys.argv[1]], rule, sys.argv[2])
"""
HALF = """
import sys, time
from peftref._replacing import replacing
with replacing(sys.argv[1]) as part:
    part.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def started(script: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


needs_locks = pytest.mark.skipif(_replacing.fcntl is None, reason="no locks that end with the process")


@needs_locks
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_merge_removes_what_a_killed_one_left_but_nothing_of_a_living_one(tmp_path: Path, end: int) -> None:
    path = written(tmp_path / "a.safetensors", {"w": torch.ones(3)})
    (tmp_path / ".out-mine").mkdir()
    killed = started(SLOW, path, tmp_path / "out")
    (old,) = (p for p in tmp_path.glob(".out-*") if p.name != ".out-mine")
    killed.send_signal(end)
    killed.wait()
    living = started(SLOW, path, tmp_path / "out")  # whose start removes the old one
    try:
        (draft,) = (p for p in tmp_path.glob(".out-*") if p.name != ".out-mine")
        assert draft != old
        merge_checkpoints(path, [path], average(), tmp_path / "other")
        with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out"):
            _ = 1 / 0
        assert (draft / SINGLE).is_file()
    finally:
        living.kill()
        living.wait()
    merge_checkpoints(path, [path], average(), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out-mine", "a.safetensors", "other", "out"]


@needs_locks
def test_the_next_file_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    replace_text(path, "old")
    killed, living = started(HALF, path), started(HALF, path)
    assert len(list(tmp_path.iterdir())) == 5
    try:
        killed.kill()
        killed.wait()
        replace_text(path, "new")
        assert path.read_text() == "new" and len(list(tmp_path.glob(".file.json.*.part"))) == 1
    finally:
        living.kill()
        living.wait()
    replace_text(path, "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replacing, "fcntl", None)
    (tmp_path / f".out-{'0' * 32}").mkdir()
    with new_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("x")
    replace_text(tmp_path / "text", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".out-{'0' * 32}", "out", "text"]


def test_everything_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch) -> None:
    done: list[str] = []
    sync, replace, rename = os.fsync, os.replace, Path.rename

    def synced(number: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{number}")).name
        done.append("sync " + ("draft" if name.startswith(".") else name))
        sync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or replace(a, b))
    monkeypatch.setattr(Path, "rename", lambda a, b: done.append("rename") or rename(a, b))
    folder = tmp_path / "there"
    with replacing(folder / "file") as part:
        part.write_text("x")
    assert done == ["sync draft", "rename", "sync there"]
    done.clear()
    base = sharded(tmp_path / "base", {"a": torch.ones(2), "b": torch.ones(3)})
    merge_checkpoints(base, [base], average(), folder / "out")
    files = sorted(f"sync {p.name}" for p in base.iterdir())
    assert sorted(done[:3]) == files and done[3:] == ["sync draft", "rename", "sync there"]


def test_numbers_are_those_of_a_loop(tmp_path: Path) -> None:
    """By hand, for a file with an odd header: 0.75 a + 0.25 b."""
    a, b = np.float32([1, -2, math.pi]), np.float32([3, 5, 7])
    paths = [written(tmp_path / f"{i}.safetensors", {"w": torch.from_numpy(v)}, 1) for i, v in enumerate((a, b))]
    got = load_file(merge_checkpoints(paths[0], [paths[1]], wise_ft(0.25), tmp_path / "out") / SINGLE)["w"]
    assert got.tolist() == pytest.approx([0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)], rel=1e-6)
