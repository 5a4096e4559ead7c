"""Views: torchvision's functions on the padded image, limiting cases, ranges of the draws, seeds, shapes and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peftref.tta.core.views import RandomViews, View, apply_view, draw_view
from tests._naive.cotta import published_view

IDENTITY = View()


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.double) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def views(size: tuple[int, int], count: int, seed: int = 0, **fixed) -> list[View]:
    g = torch.Generator().manual_seed(seed)
    return [draw_view(size, g)._replace(**fixed) for _ in range(count)]


# --- against torchvision ----------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    channels=st.sampled_from([1, 3]), height=st.integers(22, 35), width=st.integers(22, 35), seed=st.integers(0, 9999),
    noise=st.booleans(),
)  # fmt: skip
def test_equals_the_published_pipeline(channels, height, width, seed, noise):
    """Pad, transform, blur, crop with torchvision: the same pixels. Its HSV goes through float32, hence 1e-5.

    Below 22 pixels the blur can reach the black beyond torchvision's padding; ours continues the border.
    """
    x = images(2, channels, height, width, seed=seed)
    fixed = {} if noise else {"noise": None}
    view = views((height, width), 1, seed, **fixed)[0]
    assert_close(apply_view(x, view), published_view(x, view), rtol=0, atol=1e-5 if channels == 3 else 1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"brightness": 1.4}, {"contrast": 0.7}, {"saturation": 0.5}, {"hue": 0.06}, {"hue": -0.06}, {"gamma": 1.3},
        {"angle": 15.0}, {"angle": -15.0}, {"shift": (4, -3)}, {"scale": 0.9}, {"scale": 1.1}, {"sigma": 0.5},
        {"flip": True}, {"noise": 1}, {"angle": 15.0, "shift": (4, 4), "scale": 0.9},
    ],
)  # fmt: skip
def test_each_field_alone(change):
    """At the ends of its range every field does something, and what torchvision does."""
    x = images(2, 3, 32, 32)
    out = apply_view(x, IDENTITY._replace(**change))
    assert_close(out, published_view(x, IDENTITY._replace(**change)), rtol=0, atol=1e-5)
    assert (out - x).abs().max() > 1e-3


def test_order_of_the_colour_changes_matters():
    x = images(2, 3, 8, 8)
    a = IDENTITY._replace(brightness=1.4, gamma=1.3)
    b = a._replace(order=(4, 3, 2, 1, 0))
    assert (apply_view(x, a) - apply_view(x, b)).abs().max() > 1e-2


# --- limiting cases ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 31, 17), (1, 1, 5, 5), (0, 3, 8, 8)])
def test_the_default_view_is_the_identity(shape):
    x = images(*shape)
    assert_close(apply_view(x, IDENTITY), x, rtol=0, atol=2e-8)  # 0 becomes the 1e-8 of the gamma


def test_whole_pixel_shift_repeats_the_border():
    x = images(1, 1, 9, 9)
    out = apply_view(x, IDENTITY._replace(shift=(2, 0)))
    assert_close(out[..., 2:], x[..., :-2], rtol=0, atol=1e-7)
    assert_close(out[..., :2], x[..., :1].expand(-1, -1, -1, 2), rtol=0, atol=1e-7)


def test_turning_there_and_back():
    """On a smooth image, far from the border, a rotation and its inverse cancel."""
    r = torch.linspace(-1, 1, 41, dtype=torch.double)
    x = (0.5 + 0.3 * torch.sin(2 * r)[:, None] * torch.cos(2 * r)[None, :]).expand(1, 1, 41, 41)
    back = apply_view(apply_view(x, IDENTITY._replace(angle=10.0)), IDENTITY._replace(angle=-10.0))
    assert (back - x)[..., 8:-8, 8:-8].abs().max() < 2e-3
    assert (apply_view(x, IDENTITY._replace(angle=10.0)) - x)[..., 8:-8, 8:-8].abs().max() > 2e-2


def test_constant_images_stay_constant():
    """Geometry, blur and borders invent nothing."""
    x = torch.full((1, 1, 12, 12), 0.37, dtype=torch.double)
    for view in views((12, 12), 20, noise=None, brightness=1.0, gamma=1.0):
        assert_close(apply_view(x, view), x, rtol=0, atol=1e-12)


def test_grey_images_in_three_channels_stay_grey():
    x = images(2, 1, 16, 16)
    for view in views((16, 16), 10, noise=None):
        out = apply_view(x.expand(-1, 3, -1, -1), view)
        assert_close(out, apply_view(x, view).expand_as(out), rtol=0, atol=2e-4)  # the luma weights sum to 0.9999


def test_one_view_for_the_whole_batch():
    x = images(1, 3, 16, 16).expand(4, -1, -1, -1)
    for view in views((16, 16), 5, noise=None):
        out = apply_view(x, view)
        assert_close(out, out[:1].expand_as(out), rtol=0, atol=1e-12)


# --- draws ------------------------------------------------------------------------------------------------------------
def test_ranges_of_the_draws():
    """4000 draws fill the published ranges and never leave them."""
    drawn = views((32, 32), 4000)
    ranges = {
        "brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "saturation": (0.5, 1.5), "hue": (-0.06, 0.06),
        "gamma": (0.7, 1.3), "angle": (-15, 15), "scale": (0.9, 1.1), "sigma": (0.001, 0.5),
    }  # fmt: skip
    for field, (low, high) in ranges.items():
        values = torch.tensor([getattr(v, field) for v in drawn])
        slack = 0.01 * (high - low)
        assert low <= values.min() < low + slack and high - slack < values.max() <= high, field
        # mean of U[low, high] within 5 standard errors
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / (12 * 4000) ** 0.5, field
    shifts = torch.tensor([v.shift for v in drawn])
    assert shifts.min() == -4 and shifts.max() == 4 and shifts.dtype == torch.int64  # 32 / 8
    flips = sum(v.flip for v in drawn)
    assert abs(flips - 2000) < 5 * 4000**0.5 / 2
    assert len({v.order for v in drawn}) == 120 and len({v.noise for v in drawn}) == 4000


@pytest.mark.parametrize(("size", "reach"), [((28, 28), [3, 3]), ((33, 33), [4, 4]), ((8, 32), [4, 1])])
def test_reach_of_the_shift(size, reach):
    """1/16 of the padded side, rounded (3.5 is never reached); x moves along the width, y along the height."""
    shifts = torch.tensor([v.shift for v in views(size, 2000)]).abs().amax(0)
    assert shifts.tolist() == reach


def test_no_flip_where_none_is_allowed():
    x = images(1, 1, 8, 8)
    plain, mirrored = RandomViews(3, flip=False), RandomViews(3)
    assert not all(torch.equal(plain(x), mirrored(x)) for _ in range(10))
    g = torch.Generator().manual_seed(0)
    assert not any(draw_view((8, 8), g, flip=False).flip for _ in range(100))


def test_seeds_and_reset():
    x = images(2, 1, 12, 12)
    a, b, c = RandomViews(0), RandomViews(0), RandomViews(1)
    first = [a(x) for _ in range(4)]
    assert all(torch.equal(u, b(x)) for u in first)
    assert not any(torch.equal(u, c(x)) for u in first)
    assert not torch.equal(first[0], first[1])
    a.reset()
    assert all(torch.equal(u, a(x)) for u in first)


def test_torchs_own_random_state_is_left_alone():
    before = torch.get_rng_state()
    RandomViews(0)(images(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


# --- shapes, dtypes, gradients, refusals ------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3), channels=st.sampled_from([1, 3]), height=st.integers(1, 20), width=st.integers(1, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 999),
)  # fmt: skip
def test_shape_dtype_and_range_are_kept(n, channels, height, width, dtype, seed):
    x = images(n, channels, height, width, seed=seed)
    kept = x.clone()
    view = views((height, width), 1, seed)[0]
    out = apply_view(x.to(dtype), view)
    assert out.shape == x.shape and out.dtype == dtype
    assert out.isfinite().all() and (out >= 0).all() and (out <= 1).all()
    assert torch.equal(x, kept)
    if dtype == torch.float32:
        quiet = apply_view(x, view._replace(noise=None))
        assert_close(out, quiet.float(), rtol=0, atol=0.03)  # six sigma


def test_black_pixels_have_finite_gradients():
    """x ** 0.7 has an infinite slope at 0; the clamp keeps it away."""
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    apply_view(x, IDENTITY._replace(gamma=0.7)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 2, 8, 8), (2, 4, 8, 8)])
def test_other_than_images_is_refused(shape):
    with pytest.raises(ValueError, match="x: expected images"):
        apply_view(torch.rand(*shape), IDENTITY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [lambda x: (x - 0.45) / 0.225, lambda x: 255 * x, lambda x: x + 0.01 * (x > 0.9)])
def test_values_outside_the_range_are_refused_before_a_view_is_drawn(change, dtype):
    """Clipped, normalised images would be black and white, and those of 0 to 255 white."""
    x = images(2, 3, 8, 8)
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    views = RandomViews(0)
    before = views.generator.get_state()
    for call in (views, views.check, lambda x: apply_view(x, IDENTITY)):
        with pytest.raises(ValueError, match=r"x: expected images with values in \[0, 1\], got"):
            call(change(x).to(dtype))
    assert torch.equal(views.generator.get_state(), before)
    assert views(x.to(dtype)).shape == x.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_pixel_is_no_other_range(value):
    x = images(2, 1, 8, 8)
    x[0, 0, 3, 3] = value
    views = [v(x)[1] for v in (RandomViews(0), RandomViews(0))]
    assert torch.equal(*views) and views[0].isfinite().all()
