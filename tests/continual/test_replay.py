"""The reservoir: every sample of the stream has the same chance; batched is one by one; state, devices, errors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from peftref.continual.core.replay import Reservoir
from tests._naive.rehearsal import LoopReservoir


def filled(size: int, n: int, seed: int = 0, batch: int = 7) -> Reservoir:
    buffer = Reservoir(size, seed)
    for x in torch.arange(n).split(batch):
        buffer.add(x.float(), x)
    return buffer


def held(buffer: Reservoir) -> list[int]:
    return buffer.rows[1][: len(buffer)].tolist()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), cuts=st.lists(st.integers(0, 12), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_batched_is_one_by_one(size, cuts, seed):
    """Same random numbers, same slots, exactly, whatever the batches; also where several samples hit one slot."""
    ours, twin = Reservoir(size, seed), LoopReservoir(size, seed)
    for x in torch.arange(sum(cuts)).split(cuts):
        ours.add(x)
        twin.add(x.tolist())
        expected = [s for s in twin.slots if s is not None]
        assert len(ours) == len(expected) and ours.seen == twin.seen
        assert not expected or ours.rows[0][: len(ours)].tolist() == expected


def test_several_samples_of_one_batch_hit_one_slot():
    """With one slot and a batch of 50 that happens; the last one stays."""
    for seed in range(20):
        ours, twin = Reservoir(1, seed), LoopReservoir(1, seed)
        ours.add(torch.arange(50))
        twin.add(list(range(50)))
        assert ours.rows[0].tolist() == twin.slots


def test_while_there_is_room_all_are_kept_in_order():
    assert held(filled(20, 13)) == list(range(13))
    assert held(filled(20, 20)) == list(range(20))


def test_every_sample_has_the_same_chance():
    """M / n for each of n = 40 places in the stream; chi-square over 4,000 seeds."""
    size, n, seeds = 8, 40, 4000
    count = torch.zeros(n)
    for seed in range(seeds):
        buffer = Reservoir(size, seed)
        for x in torch.arange(n).split(9):
            buffer.add(x)
        kept = buffer.rows[0]
        assert len(set(kept.tolist())) == size
        count[kept] += 1
    expected, p = seeds * size / n, size / n
    # Counts are binomial, and each run keeps exactly `size`: the sum of squares over n p (1 - p) n / (n - 1) is chi2.
    statistic = ((count - expected) ** 2).sum().item() / (seeds * p * (1 - p)) * (n - 1) / n
    assert 1e-3 < stats.chi2.sf(statistic, n - 1) < 1 - 1e-3


def test_the_buffer_mirrors_the_shares_of_the_stream():
    y = torch.arange(4000) // 800  # five tasks of 800, one after the other
    buffer = Reservoir(500, 1)
    for batch in y.split(10):
        buffer.add(batch)
    # hypergeometric: 100 each, standard deviation about 8.4
    assert (buffer.rows[0].bincount(minlength=5) - 100).abs().max() < 34


def test_draw_is_without_replacement_and_keeps_rows_together():
    buffer = filled(50, 200)
    x, y = buffer.draw(30)
    assert len(set(y.tolist())) == 30 and set(y.tolist()) <= set(held(buffer))
    assert torch.equal(x.long(), y)
    assert sorted(buffer.draw(1000)[1].tolist()) == sorted(held(buffer))  # at most what is there
    assert len(filled(50, 3).draw(10)[1]) == 3


def test_draws_are_uniform():
    buffer, count = filled(10, 10), torch.zeros(10)
    for _ in range(3000):
        count[buffer.draw(3)[1]] += 1
    statistic = ((count - 900) ** 2).sum().item() / (3000 * 0.3 * 0.7) * 9 / 10
    assert 1e-3 < stats.chi2.sf(statistic, 9) < 1 - 1e-3


def test_seeds():
    assert held(filled(10, 300, 0)) == held(filled(10, 300, 0)) != held(filled(10, 300, 1))
    a, b, c = filled(10, 300, 0), filled(10, 300, 0), filled(10, 300, 0)
    assert torch.equal(a.draw(5)[1], b.draw(5)[1])
    assert not torch.equal(a.draw(5)[1], c.draw(5)[1])  # a has drawn before


def test_torchs_own_generator_is_left_alone():
    random = torch.get_rng_state()
    filled(10, 300).draw(5)
    assert torch.equal(torch.get_rng_state(), random)


def test_rows_are_copies_without_gradient():
    x = torch.zeros(3, 2, requires_grad=True)
    buffer = Reservoir(5)
    buffer.add(x, torch.arange(3))
    assert not buffer.rows[0].requires_grad
    with torch.no_grad():
        x += 1
    assert (buffer.draw(3)[0] == 0).all()
    drawn = buffer.draw(3)
    drawn[1].fill_(9)
    assert set(held(buffer)) == {0, 1, 2}


def test_dtypes_stay():
    buffer = Reservoir(4)
    rows = torch.ones(6, 2, dtype=torch.bfloat16), torch.ones(6, dtype=torch.long), torch.ones(6, 3).double()
    buffer.add(*rows)
    assert [t.dtype for t in buffer.draw(4)] == [t.dtype for t in rows]
    buffer.add(*rows)
    assert [t.dtype for t in buffer.draw(4)] == [t.dtype for t in rows]


TYPES = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("first", TYPES, ids=str)
@pytest.mark.parametrize("then", TYPES, ids=str)
def test_what_comes_in_another_type_is_kept_as_it_was_or_refused(first, then):
    """The largest number of each type, and one that only float32 tells from its neighbours."""

    def extremes(dtype):
        odd = [1.0009765625] if dtype.is_floating_point else [77]
        big = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.tensor([*odd, big]).to(torch.float64 if dtype.is_floating_point else torch.int64).to(dtype)

    buffer, old, new = Reservoir(4), extremes(first), extremes(then)
    buffer.add(old, torch.arange(2))
    before = copy.deepcopy(buffer.state_dict())
    if first.is_floating_point != then.is_floating_point:
        with pytest.raises(TypeError, match=f"batch: expected rows of {first}, as before, .* got {then}"):
            buffer.add(new, torch.arange(2))
        assert all(torch.equal(t, before[name]) for name, t in buffer.state_dict().items())
        return
    buffer.add(new, torch.arange(2))
    wide = torch.float64 if first.is_floating_point else torch.int64
    assert torch.equal(buffer.rows[0].to(wide), torch.cat([old.to(wide), new.to(wide)]))
    state = buffer.state_dict()
    other = Reservoir(4)
    other.load_state_dict(state)
    assert torch.equal(other.rows[0], buffer.rows[0]) and other.rows[0].dtype == buffer.rows[0].dtype


def test_types_that_no_other_holds_are_refused():
    buffer = Reservoir(4)
    buffer.add(torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="batch: expected rows of torch.float8_e4m3fn"):
        buffer.add(torch.zeros(2))
    buffer.add(torch.zeros(2, dtype=torch.float8_e4m3fn))
    assert len(buffer) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_choice_does_not_depend_on_the_device():
    there = Reservoir(10)
    for x in torch.arange(300).split(7):
        there.add(x.float().cuda(), x.cuda())
    assert there.rows[0].is_cuda and held(there) == held(filled(10, 300))
    assert torch.equal(there.draw(5)[1].cpu(), filled(10, 300).draw(5)[1])
    there.add(torch.zeros(5), torch.zeros(5).long())  # rows stay where the first batch was
    assert there.rows[0].is_cuda


def test_going_on_from_a_saved_state():
    buffer = filled(10, 300)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = Reservoir(10, seed=99)
    other.load_state_dict(torch.load(file, weights_only=True))
    for b in (buffer, other):
        b.add(torch.arange(300, 400).float(), torch.arange(300, 400))
    assert held(other) == held(buffer) and other.seen == buffer.seen == 400
    assert torch.equal(other.draw(5)[1], buffer.draw(5)[1])


def test_a_state_is_a_snapshot():
    buffer = filled(10, 300)
    state, then = buffer.state_dict(), held(buffer)
    buffer.add(torch.zeros(500), torch.zeros(500, dtype=torch.long))
    other = Reservoir(10)
    other.load_state_dict(state)
    assert held(other) == then != held(buffer)
    other.add(torch.zeros(500), torch.zeros(500, dtype=torch.long))
    assert state["rows.1"].tolist() == then


def test_an_empty_buffer_has_a_state():
    other = filled(10, 30)
    other.load_state_dict(Reservoir(10, 3).state_dict())
    assert len(other) == 0
    other.add(torch.arange(20))  # rows of another kind
    assert len(other) == 10


def test_empty_batches():
    buffer = Reservoir(3)
    buffer.add(torch.zeros(0, 2))
    assert len(buffer) == 0
    buffer.add(torch.ones(1, 2))
    buffer.add(torch.zeros(0, 2))
    assert len(buffer) == 1 and (buffer.draw(1)[0] == 1).all()


def state_of(buffer: Reservoir) -> dict[str, Tensor]:
    return copy.deepcopy(buffer.state_dict())


X, Y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: b.add(), "batch: expected tensors of one length"),
        (lambda b: b.add(X, Y[:3]), r"batch: expected tensors of one length, got \[4, 3\]"),
        (lambda b: b.add(X), "batch: expected rows of shapes"),
        (lambda b: b.add(X, Y, Y), "batch: expected rows of shapes"),
        (lambda b: b.add(X[:, :1], Y), r"batch: expected rows of shapes \[\(2,\), \(\)\], as before"),
        (lambda b: b.draw(0), "n: expected an integer >= 1, got 0"),
        (lambda b: b.draw(-1), "n: expected an integer >= 1"),
        (lambda b: b.load_state_dict(filled(4, 9).state_dict()), "state: expected a buffer of 3 samples"),
    ],
)
def test_errors_come_before_effects(call, says):
    buffer = Reservoir(3)
    buffer.add(X, Y)
    before = state_of(buffer)
    with pytest.raises(ValueError, match=says):
        call(buffer)
    after = state_of(buffer)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_broken_state_changes_nothing():
    buffer = filled(10, 30)
    before, broken = state_of(buffer), filled(10, 99).state_dict()
    broken["generator"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        buffer.load_state_dict(broken)
    after = state_of(buffer)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("size", [0, -1, 2.5, "3"])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="size: expected an integer >= 1"):
        Reservoir(size)


def test_nothing_can_be_drawn_from_nothing():
    with pytest.raises(ValueError, match="draw: expected a buffer"):
        Reservoir(3).draw(1)
