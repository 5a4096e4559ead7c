"""CLASSP's published protocol, end to end on files laid out like MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.continual.baselines.ewc import EWC
from peftref.continual.classp import CLASSP
from peftref.continual.core.streams import Task, domain_incremental
from peftref.continual.experiments.classp_at_scale import (
    FILES,
    Method,
    PaperCNN,
    as_published,
    full_mnist,
    published_switch,
    run_at_scale,
)
from peftref.data import Split, load


def lay(folder: Path, each: tuple[int, int] = (12, 4), *, packed: bool = False, flip: bool = False) -> Path:
    """The four IDX files, shortened: a bright row says the class."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for count, images, labels in zip(each, FILES[::2], FILES[1::2], strict=True):
        y = np.tile(np.arange(10, dtype=np.uint8), count)
        x = rng.integers(0, 60, (len(y), 28, 28), dtype=np.uint8)
        x[np.arange(len(y)), 2 * y.astype(int) + 4] = 255
        x = x.transpose(0, 2, 1) if flip else x
        for name, a in ((images, np.ascontiguousarray(x)), (labels, y)):
            body = bytes([0, 0, 8, a.ndim]) + struct.pack(f">{a.ndim}I", *a.shape) + a.tobytes()
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(body) if packed else body)
    return folder


def stream(each: int = 40) -> list[Task]:
    tasks = domain_incremental(load("mnist5k"), load("fashion8k"))
    return [t._replace(train=Split(*(v[:each] for v in t.train)), test=Split(*(v[:30] for v in t.test))) for t in tasks]


PUBLISHED = partial(CLASSP, lr=0.05, threshold=0.5, apply_decay=False, mode="official")


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_as_laid(tmp_path, packed):
    inner = full_mnist(lay(tmp_path / "MNIST" / "raw", packed=packed))
    outer = full_mnist(tmp_path)
    assert inner.name == "mnist" and inner.sha256 == outer.sha256 and inner.classes == tuple("0123456789")
    assert inner.train.x.shape == (120, 1, 28, 28) and inner.test.y.tolist() == list(range(10)) * 4
    assert inner.train.x.max() == 1.0 and inner.train.x.dtype == torch.float32


def test_mnist_that_is_absent_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="root: expected train-images"):
        full_mnist(tmp_path)
    folder = lay(tmp_path / "a")
    short = lay(tmp_path / "b", each=(3, 4))
    (folder / FILES[1]).write_bytes((short / FILES[1]).read_bytes())
    with pytest.raises(ValueError, match="expected as many labels as images, got 120 images, 30 labels"):
        full_mnist(folder)


def test_network_is_the_published_one():
    net = PaperCNN()
    shapes = [tuple(p.shape) for p in net.parameters() if p.ndim > 1]
    assert shapes == [(32, 1, 3, 3), (64, 32, 3, 3), (128, 9216), (10, 128)]
    x = torch.rand(2, 1, 28, 28)
    net.eval()
    assert_close(net(x), nn.Sequential(*net)((x - 0.1307) / 0.3081))
    assert PaperCNN(width=4, side=14)(torch.rand(3, 1, 14, 14)).shape == (3, 10)


def test_as_published_has_dropout_on_and_leaves_the_model_alone():
    net, split = PaperCNN(width=2), stream(400)[0].train
    net[9].train()
    net[5].eval()
    modes = [m.training for m in net.modules()]
    logits: list[Tensor] = []
    hook = net.register_forward_hook(lambda module, args, output: logits.append(output))
    for _ in range(2):
        as_published(net, split, batch_size=400)
    hook.remove()
    assert not torch.equal(*logits), "dropout is random"
    assert [m.training for m in net.modules()] == modes
    with pytest.raises(RuntimeError):
        as_published(net, Split(split.x[:, :, :5], split.y))
    assert [m.training for m in net.modules()] == modes


def test_the_table_is_what_its_pieces_give():
    """Plain steps while MNIST is learned, decayed ones afterwards, and the network of the seed."""
    tasks, small = stream(), partial(PaperCNN, width=2)
    calls = []

    def switch(optimizer: CLASSP) -> None:
        calls.append([optimizer.state[p]["sum"].clone() for p in optimizer.param_groups[0]["params"]])
        published_switch(optimizer)

    methods = {"CLASSP": Method(PUBLISHED, switch), "SGD": Method(lambda p: torch.optim.SGD(p, lr=0.05))}
    table = run_at_scale(tasks, methods, model=small, epochs=(2, 1), seeds=[3], device="cpu")
    assert table.index.tolist() == [("CLASSP", 3), ("SGD", 3)] and len(calls) == 1
    assert table["first, before (%)"].nunique() == 1, "the first task is learned by the same plain steps"
    assert all((s >= 0).all() for s in calls[0]) and sum(float(s.sum()) for s in calls[0]) > 0
    assert table.attrs["protocol"]["train"] == [40, 40] and table.attrs["protocol"]["epochs"] == [2, 1]
    again = run_at_scale(tasks, methods, model=small, epochs=(2, 1), seeds=[3], device="cpu")
    assert table.equals(again)
    assert table.to_numpy().min() >= 0 and table.to_numpy().max() <= 100


def test_switch_sets_every_group():
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "threshold": 2.0}]
    optimizer = PUBLISHED(groups)
    published_switch(optimizer)
    assert [(g["apply_decay"], g["threshold"]) for g in optimizer.param_groups] == [(True, 0.0)] * 2


def test_caller_s_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run_at_scale(stream(), {"CLASSP": Method(PUBLISHED)}, model=partial(PaperCNN, 2), epochs=(1, 1), device="cpu")
    assert torch.equal(torch.rand(1), expected)


def test_one_task_is_refused():
    with pytest.raises(ValueError, match="tasks, epochs: expected two of each, got 1 and 2"):
        run_at_scale(stream()[:1], {})


def test_laid_files_end_to_end(tmp_path):
    mnist = full_mnist(lay(tmp_path / "mnist"))
    fashion = load("fashion_mnist", lay(tmp_path / "fashion", flip=True))
    methods = {
        "CLASSP": Method(PUBLISHED, published_switch),
        "EWC": Method(lambda p: torch.optim.SGD(p, lr=0.05), rule=lambda: EWC(10.0)),
    }
    tasks = domain_incremental(mnist, fashion)
    table = run_at_scale(tasks, methods, model=partial(PaperCNN, 4), epochs=(6, 6), batch_size=10, device="cpu")
    assert table.shape == (2, 5)
    assert (table["first, before (%)"] > 60).all(), "bright rows are easy to tell apart"
