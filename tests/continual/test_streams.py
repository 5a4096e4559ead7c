"""Splits of a data set into tasks: what is in them, in which order, and that nothing leaks or is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.continual.core.streams import Task, class_incremental, domain_incremental, task_of
from peftref.data import Dataset, Split, load
from peftref.fitting import batches

DIGITS = load("digits")


def numbered(per_class: int = 6, k: int = 4) -> Dataset:
    """Every image is its own number, so that it can be found again."""
    y = torch.arange(per_class * k) % k
    x = torch.arange(len(y)).float().reshape(-1, 1, 1, 1)
    return Dataset("numbered", Split(x, y), Split(x + 1000, y), tuple("abcdefgh"[:k]), "")


def ids(split: Split) -> list[int]:
    return split.x.flatten().int().tolist()


# --- class-incremental ------------------------------------------------------------------------------------------------
def test_order_0_is_the_stored_one_and_others_are_numpys():
    for seed in (0, 1, 2):
        names = [name for task in class_incremental(DIGITS, 5, seed=seed) for name in task.names]
        order = range(10) if seed == 0 else np.random.default_rng(42 + seed).permutation(10)
        assert names == [DIGITS.classes[i] for i in order]
    assert names != list(DIGITS.classes)


@pytest.mark.parametrize("seed", [0, 3])
def test_labels_are_renumbered_and_images_keep_their_class(seed):
    data = numbered()
    tasks = class_incremental(data, [1, 3], seed=seed)
    assert [task.classes for task in tasks] == [range(0, 1), range(1, 4)]
    for task in tasks:
        for split, start in ((task.train, 0), (task.test, 1000)):
            for i, k in zip(ids(split), split.y.tolist(), strict=True):
                assert k in task.classes
                assert task.names[k - task.classes.start] == data.classes[data.train.y[i - start]]
    assert sorted(i for task in tasks for i in ids(task.train)) == list(range(24))  # each once
    assert sorted(i for task in tasks for i in ids(task.test)) == list(range(1000, 1024))


def test_without_a_choice_images_stay_in_stored_order():
    task = class_incremental(numbered(), 2)[0]
    assert ids(task.train) == sorted(ids(task.train))
    assert len(task.val.y) == 0


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 9), val=st.sampled_from([0.0, 0.2, 0.5]), per_class=st.sampled_from([None, 1, 3]),
    tasks=st.sampled_from([1, 2, 4, (1, 3), (2, 1, 1)]),
)  # fmt: skip
def test_validation_and_few_shots(seed, val, per_class, tasks):
    made = class_incremental(numbered(), tasks, seed=seed, val=val, per_class=per_class)
    again = class_incremental(numbered(), tasks, seed=seed, val=val, per_class=per_class)
    held = round(val * 6)
    for task, same in zip(made, again, strict=True):
        assert ids(task.train) == ids(same.train) and ids(task.val) == ids(same.val)
        assert not set(ids(task.train)) & set(ids(task.val))
        n = len(task.classes)
        assert task.val.y.bincount(minlength=4)[task.classes.start :].tolist()[:n] == [held] * n
        assert task.train.y.bincount(minlength=4)[task.classes.start :].tolist()[:n] == [per_class or 6 - held] * n
        assert ids(task.test) == sorted(ids(task.test)) and len(task.test.y) == 6 * n  # test images are never chosen


def test_the_seed_chooses_the_images_too():
    chosen = {tuple(sorted(ids(t.train)[0] for t in class_incremental(numbered(), 4, seed=s, per_class=1)))
              for s in range(8)}  # fmt: skip
    assert len(chosen) > 1


def test_the_data_set_is_left_as_it_was():
    data = numbered()
    for task in class_incremental(data, 2, seed=1):
        task.train.x.zero_(), task.train.y.zero_()
    assert torch.equal(data.train.x, numbered().train.x) and torch.equal(data.train.y, numbered().train.y)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tasks": 3}, "tasks: expected a divisor of the 4 classes"),
        ({"tasks": 0}, "tasks: expected"),
        ({"tasks": [2, 1]}, "tasks: expected positive sizes that sum to the 4"),
        ({"tasks": [4, 0]}, "tasks: expected positive"),
        ({"tasks": []}, "tasks: expected positive"),
        ({"per_class": 0}, "per_class: expected None or"),
        ({"per_class": 7}, "per_class: expected at most 6"),
        ({"per_class": 6, "val": 0.5}, "per_class: expected at most 3"),
        ({"val": 1.0}, "val: expected a share"),
        ({"val": -0.1}, "val: expected a share"),
        ({"val": 0.99}, "val: expected a share that leaves"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        class_incremental(numbered(), **{"tasks": 2, **change})


# --- domain-incremental -----------------------------------------------------------------------------------------------
def test_domains_share_their_labels():
    other = numbered()
    tasks = domain_incremental(numbered(), other)
    assert [task.classes for task in tasks] == [range(4)] * 2
    assert tasks[1].train is other.train and tasks[0].names == tuple("abcd")
    assert len(tasks[0].val.y) == 0
    assert task_of(tasks).tolist() == [0] * 4  # the first that brings them


def test_domains_must_fit_one_head():
    with pytest.raises(ValueError, match="data: expected sets of one shape"):
        domain_incremental(load("digits"), load("mnist5k"))
    with pytest.raises(ValueError, match="data: expected"):
        domain_incremental(numbered(k=4), numbered(k=3))
    with pytest.raises(ValueError, match="data: expected"):
        domain_incremental()


# --- tasks and batches ------------------------------------------------------------------------------------------------
def test_task_of_says_who_brings_a_class():
    tasks = class_incremental(DIGITS, [4, 2, 3, 1], seed=5)
    owner = task_of(tasks)
    for t, task in enumerate(tasks):
        assert (owner[task.train.y] == t).all()


def test_to_moves_all_tensors():
    task = class_incremental(numbered(), 2, val=0.5)[0]
    moved = task.to("meta")
    assert isinstance(moved, Task) and moved.names == task.names and moved.classes == task.classes
    assert {t.device.type for split in moved[2:] for t in split} == {"meta"}
    assert {t.device.type for split in task[2:] for t in split} == {"cpu"}


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 12), size=st.integers(1, 14), epochs=st.integers(0, 3), drop=st.booleans())
def test_an_epoch_shows_every_image_once(n, size, epochs, drop):
    split = Split(torch.arange(n).float(), torch.arange(n))
    got = list(batches(split, size, epochs=epochs, drop_last=drop, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(x.long(), y) for x, y in got)  # rows stay together
    seen = torch.cat([y for _, y in got]) if got else torch.zeros(0)
    if n and (not drop or n < size or n % size == 0):
        assert seen.bincount(minlength=n).tolist() == [epochs] * n if epochs else len(seen) == 0
    else:
        assert len(seen) == epochs * (n - n % size)
        assert all(len(y) == size for _, y in got if len(y))


def test_each_epoch_has_its_own_order_and_the_seed_decides_it():
    split = Split(torch.arange(50), torch.arange(50))

    def order(seed: int) -> list[int]:
        g = torch.Generator().manual_seed(seed)
        return [i for _, y in batches(split, 10, epochs=2, generator=g) for i in y.tolist()]

    assert order(0) == order(0) != order(1)
    assert order(0)[:50] != order(0)[50:]


def test_batches_complains_at_the_call():
    split, g = Split(torch.zeros(3), torch.zeros(3)), torch.Generator()
    for change in ({"batch_size": 0}, {"epochs": -1}):
        with pytest.raises(ValueError, match="(batch_size|epochs): expected an integer"):
            batches(split, **{"batch_size": 1, "generator": g, **change})  # not even asked for a batch


def test_the_same_seed_gives_the_same_stream():
    """Sum over a stream weighted by position: another order of anything changes it."""

    def mark(seed: int) -> float:
        total, g = 0.0, torch.Generator().manual_seed(seed)
        for task in class_incremental(DIGITS, 5, seed=seed, per_class=20, val=0.1):
            for i, (x, y) in enumerate(batches(task.train, 10, generator=g)):
                total += (i + 1) * float((x.double().sum((1, 2, 3)) * (y + 1)) @ torch.arange(len(y)).double())
        return total

    assert mark(1) == mark(1)
    assert len({mark(seed) for seed in range(4)}) == 4
