"""Levels: nearest of all by exhaustive comparison, bounds, ends, guards, bytes, files, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from peftref.merging.core.quantise import Quantised, quantise
from tests._naive import rws as naive

KINDS = ("linear", "tanh", "log")


def sample(n: int = 500, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def rounded(x: Tensor, levels: int, kind: str) -> Tensor:
    return quantise({"w": x}, levels, kind).dequantise()["w"]


# -- the definition


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 30), levels=st.integers(2, 40), kind=st.sampled_from(KINDS), seed=st.integers(0, 9999),
    zeros=st.booleans(),
)  # fmt: skip
def test_each_entry_moves_to_the_nearest_level(n: int, levels: int, kind: str, seed: int, zeros: bool) -> None:
    x = sample(n, seed)
    x[: n // 3] *= 0.0 if zeros else 1.0
    expected = torch.tensor(naive.loop_quantise(x.tolist(), levels, kind), dtype=torch.float64)
    assert_close(rounded(x, levels, kind), expected, rtol=1e-9, atol=1e-12)


def test_closed_form() -> None:
    x = torch.tensor([0.0, 0.9, 1.6, 3.0])
    stored = quantise({"w": x}, 4)
    assert stored.codes["w"].tolist() == [0, 1, 2, 3] and stored.ranges["w"].tolist() == [0.0, 3.0]
    assert stored.dequantise()["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert rounded(torch.tensor([-8.0, 1.0, 0.0, 2.1, -3.0]), 8, "log").tolist() == [-8.0, 1.0, 0.0, 2.0, -4.0]


# -- bounds


@settings(max_examples=40, deadline=None)
@given(levels=st.integers(2, 300), scale=st.sampled_from([1e-6, 1e-3, 1.0, 50.0]), seed=st.integers(0, 99))
def test_linear_error_and_ends(levels: int, scale: float, seed: int) -> None:
    x = sample(seed=seed, scale=scale, dtype=torch.float32)
    y = rounded(x, levels, "linear")
    low, high = x.aminmax()
    assert (y - x).abs().max() <= (high - low) / (2 * (levels - 1)) * (1 + 1e-4) + 1e-6 * scale
    assert y[x.argmin()] == low and y[x.argmax()] == high and len(y.unique()) <= levels


@settings(max_examples=40, deadline=None)
@given(levels=st.integers(2, 300), scale=st.sampled_from([1e-6, 1e-3, 1.0, 50.0]), seed=st.integers(0, 99))
def test_log_keeps_signs_zeros_and_ends(levels: int, scale: float, seed: int) -> None:
    x = sample(seed=seed, scale=scale, dtype=torch.float32)
    x[::7] = 0.0
    y, size = rounded(x, levels, "log"), x.abs()
    assert torch.equal(y.sign(), x.sign()) and len(y.unique()) <= 2 * (levels // 2) + 1
    small, large = size[size > 0].aminmax()
    m = levels // 2
    step = (large / small).log2() / max(m - 1, 1)
    off = (y.abs().log2() - size.log2())[size > 0].abs()
    assert off.max() <= step / 2 + 1e-4
    if m > 1:
        assert y.abs()[size == small].eq(small).all() and y.abs()[size == large].eq(large).all()


@settings(max_examples=40, deadline=None)
@given(levels=st.integers(2, 300), scale=st.sampled_from([1e-3, 1.0, 5.0]), seed=st.integers(0, 99))
def test_tanh_error_on_its_scale_and_ends(levels: int, scale: float, seed: int) -> None:
    x = sample(seed=seed, scale=scale)
    y = rounded(x, levels, "tanh")
    low, high = x.aminmax()
    assert (y.tanh() - x.tanh()).abs().max() <= (high.tanh() - low.tanh()) / (2 * (levels - 1)) + 1e-12
    assert y[x.argmin()] == low and y[x.argmax()] == high and len(y.unique()) <= levels


def test_tanh_is_linear_on_small_numbers_and_not_on_large_ones() -> None:
    small, large = 1e-4 * sample(), 2 * sample()
    assert_close(rounded(small, 16, "tanh"), rounded(small, 16, "linear"), rtol=0, atol=1e-9)
    assert not torch.allclose(rounded(large, 16, "tanh"), rounded(large, 16, "linear"), atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_many_levels_converge_to_the_identity(kind: str) -> None:
    x = sample()
    errors = [(rounded(x, levels, kind) - x).abs().max() for levels in (16, 256, 4096, 2**16)]
    assert all(b < a / 4 for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 2e-3


def test_levels_and_kind_matter() -> None:
    x = sample()
    results = [rounded(x, levels, kind) for levels in (4, 8) for kind in KINDS]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


# -- guards


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_tensors_come_back_as_they_were(kind: str, levels: int, dtype: torch.dtype) -> None:
    tensors = {
        "constant": torch.full((3, 2), -0.3), "zero": torch.zeros(4), "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(0.7), "huge": torch.full((2,), 1e30), "tiny": torch.full((2,), 1e-30),
    }  # fmt: skip
    tensors = {k: v.to(dtype) for k, v in tensors.items()}
    assert_close(quantise(tensors, levels, kind).dequantise(), tensors, rtol=0, atol=0)


def test_two_levels() -> None:
    x = torch.tensor([-2.0, -0.4, 0.0, 0.2, 8.0])
    assert rounded(x, 2, "linear").tolist() == [-2.0, -2.0, -2.0, -2.0, 8.0]
    assert rounded(x, 2, "tanh").tolist() == [-2.0, -2.0, -2.0, 8.0, 8.0]
    middle = math.sqrt(0.2 * 8.0)  # one level of each sign: the geometric middle
    for levels in (2, 3):
        assert_close(rounded(x, levels, "log"), torch.tensor([-middle, -middle, 0.0, middle, middle]))


def test_saturated_tanh_stays_in_the_range() -> None:
    for x in (torch.tensor([-40.0, -1.0, 0.0, 0.5, 60.0]), torch.tensor([20.0, 30.0, 40.0])):
        y = rounded(x, 8, "tanh")
        assert y.isfinite().all() and y.min() == x.min() and y.max() <= x.max()


def test_shapes_types_and_inputs() -> None:
    x = {"a": sample(24).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last), "b": sample(5).half()}
    before = {k: v.clone() for k, v in x.items()}
    for kind in KINDS:
        y = quantise(x, 8, kind).dequantise()
        assert y["a"].shape == (2, 3, 2, 2) and y["a"].dtype == torch.float64 and y["b"].dtype == torch.float32
        y["a"].zero_(), y["b"].zero_()
        assert all(torch.equal(x[k], before[k]) for k in x)


# -- storage


@pytest.mark.parametrize(
    ("levels", "kind", "dtype"),
    [
        (2, "linear", torch.uint8), (256, "linear", torch.uint8), (257, "tanh", torch.int16),
        (2**15, "tanh", torch.int16),
        (2**15 + 1, "linear", torch.int32), (2, "log", torch.int8), (255, "log", torch.int8), (256, "log", torch.int16),
    ],
)  # fmt: skip
def test_codes_take_the_smallest_type(levels: int, kind: str, dtype: torch.dtype) -> None:
    x = torch.cat([sample(2000), torch.zeros(3)])
    stored = quantise({"w": x}, levels, kind)
    assert stored.codes["w"].dtype == dtype
    step = (x.max() - x.min()) / (levels - 1)
    if kind == "linear":  # the largest codes fit, too
        assert (stored.dequantise()["w"] - x).abs().max() <= step / 2 * (1 + 1e-9)
    elif levels > 2:
        assert stored.dequantise()["w"].abs().max() == x.abs().max()


def test_bytes() -> None:
    x = {"w": sample(1000, dtype=torch.float32), "b": sample(10, dtype=torch.float32)}
    assert quantise(x, 16).nbytes == 1010 + 2 * 8
    assert quantise(x, 16).ideal_nbytes == 1010 * 4 / 8 + 2 * 8
    assert quantise(x, 1000).nbytes == 2 * 1010 + 2 * 8
    assert quantise(x, 2).ideal_nbytes == 1010 / 8 + 16
    assert quantise(x, 16, "log").ideal_nbytes == pytest.approx(1010 * math.log2(17) / 8 + 16)
    for levels, kind in ((5, "linear"), (5, "tanh"), (8, "log"), (7, "log")):  # what ideal_nbytes counts is used
        values = len(rounded(torch.cat([sample(5000), torch.zeros(1)]), levels, kind).unique())
        assert quantise({"w": x["b"]}, levels, kind).ideal_nbytes - 8 == pytest.approx(10 * math.log2(values) / 8)


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: str, tmp_path) -> None:
    x = {"a/b.weight": sample(24).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last), "bias": sample(4)}
    stored = quantise(x, 300, kind)
    stored.save(tmp_path / "fog.safetensors")
    again = Quantised.load(tmp_path / "fog.safetensors")
    assert (again.levels, again.kind, again.nbytes) == (300, kind, stored.nbytes)
    assert_close(again.dequantise(), stored.dequantise(), rtol=0, atol=0)
    assert (tmp_path / "fog.safetensors").stat().st_size < stored.nbytes + 600  # names and shapes


# -- refusals


def test_refusals(tmp_path) -> None:
    x = {"w": sample()}
    for levels, error in ((1, ValueError), (-4, ValueError), (65537, ValueError), (4.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="levels: expected"):
            quantise(x, levels)
    with pytest.raises(ValueError, match="kind: expected one of linear, tanh, log, got 'cubic'"):
        quantise(x, 4, "cubic")
    with pytest.raises(TypeError, match="signature: expected a mapping"):
        quantise(x["w"], 4)
    with pytest.raises(ValueError, match="not floating-point: w"):
        quantise({"w": torch.ones(2, dtype=torch.long)}, 4)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite numbers, got others in w"):
            quantise({"v": torch.ones(2), "w": torch.tensor([0.0, bad])}, 4)
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="path: expected a file of Quantised.save"):
        Quantised.load(tmp_path / "other.safetensors")
    save_file({"codes/w": torch.ones(2)}, tmp_path / "other.safetensors", metadata={"levels": "4", "kind": "cubic"})
    with pytest.raises(ValueError, match="kind: expected one of"):
        Quantised.load(tmp_path / "other.safetensors")


def test_levels_of_torch() -> None:
    wanted = quantise({"w": torch.linspace(-1, 1, 9)}, 4)
    got = quantise({"w": torch.linspace(-1, 1, 9)}, torch.tensor(4))
    assert torch.equal(got.codes["w"], wanted.codes["w"]) and type(got.levels) is int
