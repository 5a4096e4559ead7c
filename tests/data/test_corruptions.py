"""The corruptions against independent code: imagecorruptions, scikit-image, SciPy, OpenCV, Pillow.

Random corruptions are compared on the same random numbers: ours are drawn again from the seed and handed to the peer.
"""

import io

import cv2
import imagecorruptions.corruptions as peer
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import skimage.color
import skimage.filters
import torch
from imagecorruptions import corrupt as peer_corrupt
from imagecorruptions import get_corruption_names
from PIL import Image
from torch.testing import assert_close

from peftref.data import _filters, _jpeg, _textures
from peftref.data.corruptions import CORRUPTIONS, EXTRA, TABLES, corrupt

ALL = CORRUPTIONS + EXTRA
DETERMINISTIC = (
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate",
)  # fmt: skip
RANDOM = tuple(name for name in ALL if name not in DETERMINISTIC)
SEVERITIES = range(1, 6)


def pictures(n=4, channels=3, height=48, width=None, seed=0):
    """Smooth random images with one sharp-edged patch, on whole levels."""
    width = width or height
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 + 3 * _filters.gaussian(torch.randn(n, channels, height, width, generator=generator), 2.0)
    x[:, :, height // 4 : height // 2, width // 3 :] = torch.rand(n, channels, 1, 1, generator=generator)
    return (x.clamp(0, 1) * 255).round() / 255


def levels(x):
    """``(N, C, H, W)`` in [0, 1] -> integers ``(N, H, W, C)``."""
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def differences(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Deterministic corruptions, level by level. -------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_corruptions_equal_the_peer(name, severity):
    x = pictures()
    expected = [peer_corrupt(image, corruption_name=name, severity=severity) for image in levels(x)]
    off = differences(levels(corrupt(x, name, severity, table="imagenet")), expected)
    # The peer truncates whatever round-off left, we allow for it: one level apart where a value is (nearly) whole.
    assert off.max() <= (0 if name in ("pixelate", "jpeg_compression") else 1)
    assert off.mean() < 0.2


@pytest.mark.parametrize(("height", "width", "channels"), [(28, 28, 1), (28, 28, 3), (47, 41, 3), (9, 8, 3)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_pillow_bit_for_bit(severity, height, width, channels):
    x = pictures(3, channels, height, width, seed=severity)
    for image, ours in zip(levels(x), levels(corrupt(x, "jpeg_compression", severity)), strict=True):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
        assert (np.asarray(Image.open(file)).reshape(image.shape) == ours).all()


def test_jpeg_of_noise_is_pillow_bit_for_bit_at_every_quality():
    x = torch.randint(0, 256, (1, 3, 30, 34), generator=seeded())
    for quality in (1, 7, 24, 49, 50, 75, 99, 100):
        file = io.BytesIO()
        Image.fromarray(x[0].byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        ours = _jpeg.jpeg(x.float(), quality)[0].byte().permute(1, 2, 0).numpy()
        assert (np.asarray(Image.open(file)) == ours).all()


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_is_pillow_bit_for_bit(severity, size):
    x = pictures(3, 3, size)
    small = int(size * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    for image, ours in zip(levels(x), levels(corrupt(x, "pixelate", severity)), strict=True):
        down = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
        assert (np.asarray(down.resize((size, size), Image.Resampling.BOX)) == ours).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_blur_of_the_small_table_is_opencv(severity):
    radius, sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    x = pictures(1, 1, 28)
    expected = cv2.filter2D(x[0, 0].double().numpy(), -1, peer.disk(radius, sigma))
    assert differences(levels(corrupt(x, "defocus_blur", severity))[0, ..., 0], np.floor(expected * 255)).max() <= 1


@pytest.mark.parametrize("radius", [0.3, 1, 1.5, 3, 8, 10])
def test_disk_equals_the_peer(radius):
    ours, expected = _filters.disk(radius, 0.5, torch.ones(1)).numpy(), peer.disk(radius, 0.5)
    rim = (len(expected) - len(ours)) // 2
    assert_close(np.pad(ours, rim), expected, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0, 6.0])
def test_gaussian_is_scikit_image(sigma):
    x = pictures(1, 1, 20, 26).double()
    expected = skimage.filters.gaussian(x[0, 0].numpy(), sigma=sigma)
    assert_close(_filters.gaussian(x, sigma)[0, 0].numpy(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_of_the_small_table_is_scipy(severity):
    """The sum of ``scipy.ndimage.zoom`` of the middle, as published."""
    x = pictures(1, 1, 32)
    image = x[0, 0].double().numpy()
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    total = image.copy()
    for factor in factors:
        crop = int(np.ceil(32 / factor))
        start = (32 - crop) // 2
        part = image[start : start + crop, start : start + crop]
        total += scipy.ndimage.zoom(part, factor, order=1, mode="nearest")[:32, :32]
    expected = np.floor(total / (len(factors) + 1) * 255)
    off = differences(levels(corrupt(x, "zoom_blur", severity))[0, ..., 0], expected)
    assert off.max() <= 1 and off.mean() < 0.05


def test_brightness_and_saturate_keep_the_hue():
    x = pictures(2)
    hue, value = (skimage.color.rgb2hsv(x.double().permute(0, 2, 3, 1).numpy())[..., i] for i in (0, 2))
    out = skimage.color.rgb2hsv(corrupt(x, "saturate", 1).double().permute(0, 2, 3, 1).numpy())
    assert np.abs(out[..., 2] - value).max() < 1e-6  # the value is exact, the hue as far as 8 bits allow
    turn = np.abs(out[..., 0] - hue)[out[..., 1] > 0.1]
    assert np.median(np.minimum(turn, 1 - turn)) < 0.02


# Random corruptions on the same random numbers. ---------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise"])
def test_normal_noise_equals_the_peer(monkeypatch, name, severity):
    x = pictures(1)
    z = torch.randn(x.shape, generator=seeded())[0].permute(1, 2, 0).double().numpy()
    monkeypatch.setattr(np.random, "normal", lambda size, scale: scale * z)
    expected = peer_corrupt(levels(x)[0], corruption_name=name, severity=severity)
    assert differences(levels(corrupt(x, name, severity, table="imagenet"))[0], expected).max() <= 1


@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_normal_noise_has_the_published_standard_deviation(name, table, severity):
    published = {
        ("gaussian_noise", "cifar"): (0.04, 0.06, 0.08, 0.09, 0.10),
        ("gaussian_noise", "imagenet"): (0.08, 0.12, 0.18, 0.26, 0.38),
        ("speckle_noise", "cifar"): (0.06, 0.1, 0.12, 0.16, 0.2),
        ("speckle_noise", "imagenet"): (0.15, 0.2, 0.35, 0.45, 0.6),
    }[name, table][severity - 1]
    y = corrupt(torch.full((20, 1, 32, 32), 0.5), name, severity, table=table)
    published *= 0.5 if name == "speckle_noise" else 1
    # Clipping to [0, 1] keeps the quartiles; a normal's are 0.6745 standard deviations out.
    spread = (y.quantile(0.75) - y.quantile(0.25)).item() / (2 * 0.6745)
    assert spread == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(("table", "rates"), [("cifar", (500, 250, 100, 75, 50)), ("imagenet", (60, 25, 12, 5, 3))])
def test_shot_noise_is_poisson(table, rates):
    for severity, rate in zip(SEVERITIES, rates, strict=True):
        y = corrupt(torch.full((10, 1, 32, 32), 0.3), "shot_noise", severity, table=table)
        counts = np.round(y.flatten().numpy() * rate + 0.3 * rate / 255)  # undoes the truncation to levels
        seen = [np.mean(counts == k) for k in range(int(rate * 0.7))]
        if rate < 100:  # above, several counts share a level
            assert np.abs(seen - scipy.stats.poisson.pmf(np.arange(len(seen)), 0.3 * rate)).max() < 0.02
        if rate > 10:  # below, clipping at 1 cuts the upper tail
            assert float(y.var()) == pytest.approx(0.3 / rate, rel=0.06)


@pytest.mark.parametrize(("table", "share"), [("cifar", 0.07), ("imagenet", 0.27)])
def test_impulse_noise_is_salt_and_pepper(table, share):
    x = torch.full((40, 3, 32, 32), 128 / 255)
    y = corrupt(x, "impulse_noise", 5, table=table)
    error = 4 * (share / 2 / y.numel()) ** 0.5  # four standard errors
    assert float((y == 0).float().mean()) == pytest.approx(share / 2, abs=error)
    assert float((y == 1).float().mean()) == pytest.approx(share / 2, abs=error)
    assert ((y == x) | (y == 0) | (y == 1)).all()
    assert (y != x).any(1).float().mean() > 1.5 * share  # channels are hit independently: 1 - (1 - share)^3


@pytest.mark.parametrize(("radius", "sigma"), [(6, 1), (9, 2.5), (20, 15)])
def test_motion_blur_equals_the_peer(radius, sigma):
    x = pictures(6, 3, 50, 64).double()
    degrees = torch.tensor([-45.0, -20.0, 0.0, 33.3, 45.0, -90.0])
    ours = _filters.motion_blur(x, radius, sigma, degrees).permute(0, 2, 3, 1).numpy()
    for image, angle, y in zip(x.permute(0, 2, 3, 1).numpy(), degrees.tolist(), ours, strict=True):
        assert_close(y, peer._motion_blur(image, radius, sigma, angle), atol=1e-12, rtol=0)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_motion_blur_uses_angle_and_table(severity):
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    x = pictures(1, 3, 32)
    angle = -45 + 90 * torch.rand(1, generator=seeded()).item()
    expected = peer._motion_blur(x[0].permute(1, 2, 0).double().numpy(), radius, sigma, angle) * 255
    assert np.abs(levels(corrupt(x, "motion_blur", severity))[0] - expected).max() < 0.501  # rounded


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_equals_the_peer(monkeypatch, severity):
    x = pictures(1, 3, 180)  # every zoom divides 180: the peer's crop (a corner) is then the published one (the middle)
    generator = seeded()
    z = torch.randn(1, 1, 180, 180, generator=generator)[0, 0].numpy()
    angle = -135 + 90 * torch.rand(1, generator=generator).item()
    monkeypatch.setattr(np.random, "normal", lambda size, loc, scale: loc + scale * z)
    monkeypatch.setattr(np.random, "uniform", lambda low, high: angle)
    expected = np.uint8(peer.snow(Image.fromarray(levels(x)[0]), severity))
    off = differences(levels(corrupt(x, "snow", severity, table="imagenet"))[0], expected)
    # The published flakes are truncated to 8 bits before the blur, the peer's are not: a level for each of two layers.
    assert off.max() <= 2 and off.mean() < 0.1


@pytest.mark.parametrize("decay", [3, 1.75, 1.4])
def test_plasma_equals_the_peer(monkeypatch, decay):
    size = 64
    noise = torch.rand(1, size, size, generator=seeded()) * 2 - 1
    places = iter(
        place
        for step in (64, 32, 16, 8, 4, 2)
        for place in (
            np.s_[step // 2 :: step, step // 2 :: step],
            np.s_[::step, step // 2 :: step],
            np.s_[step // 2 :: step, ::step],
        )
    )
    monkeypatch.setattr(np.random, "uniform", lambda low, high, shape: high * noise[0].numpy()[next(places)])
    assert_close(_textures.plasma(noise, decay)[0].numpy(), peer.plasma_fractal(size, decay), atol=1e-6, rtol=0)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_adds_plasma_and_rescales(severity):
    x = pictures(2, 3, 28)
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    clouds = _textures.plasma(torch.rand(2, 32, 32, generator=seeded()) * 2 - 1, decay).numpy()
    for image, cloud, ours in zip(levels(x) / 255, clouds, levels(corrupt(x, "fog", severity)), strict=True):
        foggy = (image + amount * cloud[:28, :28, None]) * image.max() / (image.max() + amount)
        assert differences(ours, np.floor(255 * foggy)).max() <= 1


@pytest.mark.parametrize(("reach", "rounds"), [(1, 1), (1, 2), (2, 1), (3, 2), (4, 2)])
def test_shuffle_is_the_published_loop(reach, rounds):
    """The loop over pixels of the peer, on the offsets it draws from its own seed."""
    height, width = 34, 40
    x = torch.rand(1, 3, height, width, generator=seeded())
    inner = (height - 2 * reach, width - 2 * reach)
    offsets = np.random.RandomState(5).randint(-reach, reach, size=(rounds, *inner, 2))[:, ::-1, ::-1, ::-1]
    state = np.random.get_state()
    image = x[0].permute(1, 2, 0).numpy().copy()
    expected = peer._shuffle_pixels_njit_glass_blur.py_func(height, width, image, (0, reach, rounds), 5)
    np.random.set_state(state)
    for shift in torch.from_numpy(offsets.copy()).permute(0, 3, 1, 2):
        x = _textures.shuffle(x, shift[None], reach)
    assert (x[0].permute(1, 2, 0).numpy() == expected).all()


def test_glass_blur_without_shuffle_is_two_blurs():
    x = pictures(2, 1, 8)  # 8 pixels leave none to visit at a reach of 4
    twice = []
    for image in levels(x)[..., 0]:
        first = np.floor(skimage.filters.gaussian(image / 255, sigma=1.5) * 255)
        twice.append(np.floor(skimage.filters.gaussian(first / 255, sigma=1.5) * 255))
    assert differences(levels(corrupt(x, "glass_blur", 5, table="imagenet"))[..., 0], twice).max() <= 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_equals_the_peer(monkeypatch, severity, seed):
    x = pictures(1, 3, 64)
    z = torch.randn(1, 1, 64, 64, generator=seeded(seed))[0, 0].numpy()
    monkeypatch.setattr(np.random, "normal", lambda size, loc, scale: loc + scale * z)
    expected = np.uint8(peer.spatter(Image.fromarray(levels(x)[0]), severity))
    off = differences(levels(corrupt(x, "spatter", severity, table="imagenet", seed=seed))[0], expected)
    assert off.max() <= 1 and off.mean() < 0.01


def test_edge_distance_and_equalise_are_opencv():
    edge = torch.rand(3, 1, 40, 30, generator=seeded()) < 0.004
    distance = _textures.edge_distance(edge)
    counts = torch.randint(0, 21, (3, 1, 20, 20), generator=seeded())
    for i in range(3):
        expected = cv2.distanceTransform(255 * (~edge[i, 0]).numpy().astype(np.uint8), cv2.DIST_L2, 5)
        assert np.abs(distance[i, 0].numpy() - expected.clip(max=20)).max() < 0.01  # OpenCV: 16-bit fixed point
        ours = _textures.equalise(counts.float())[i, 0].numpy()
        assert (ours == cv2.equalizeHist(counts[i, 0].numpy().astype(np.uint8))).all()


def test_water_without_drops_is_dry():
    assert torch.equal(_textures.water(torch.zeros(2, 1, 9, 9)), torch.zeros(2, 1, 9, 9))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("table", TABLES)
def test_elastic_transform_is_scipy(table, severity):
    """The published steps on SciPy: affine map of three points, then a smooth displacement, both linear."""
    size = 32
    constants = {
        "cifar": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "imagenet": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    }[table][severity - 1]
    alpha, sigma, shift = (size * c * (1 if table == "cifar" else 244 / 224) for c in constants)
    x = pictures(1, 1, size)
    generator = seeded()
    corners = np.float32([[26, 26], [26, 6], [6, 6]])  # 16 +- 32 // 3
    moved = corners + shift * (2 * torch.rand(3, 2, generator=generator).numpy() - 1)
    field = 2 * torch.rand(2, size, size, generator=generator).double().numpy() - 1
    to_source = cv2.invertAffineTransform(cv2.getAffineTransform(corners, moved.astype(np.float32)))
    column, row = np.meshgrid(np.arange(size), np.arange(size))
    source = np.einsum("ij,jhw->ihw", to_source, np.stack((column, row, np.ones_like(row))))
    image = scipy.ndimage.map_coordinates(x[0, 0].double().numpy(), source[::-1], order=1, mode="mirror")
    dx, dy = (alpha * skimage.filters.gaussian(f, sigma, mode="reflect", truncate=3) for f in field)
    image = scipy.ndimage.map_coordinates(image, (row + dy, column + dx), order=1, mode="reflect")
    off = differences(levels(corrupt(x, "elastic_transform", severity, table=table))[0, ..., 0], np.floor(image * 255))
    assert off.max() <= 1 and off.mean() < 0.05


def test_frost_has_the_statistics_of_frost():
    """No photograph to compare with: level, contrast and tint stay in the stated ranges and vary over images."""
    ice = _textures.frost(torch.zeros(300, 3, 32, 32), seeded())
    level = ice.mean((1, 2, 3))
    assert 0.49 < level.min() < 0.55 and 0.75 < level.max() < 0.81
    red, green, blue = ice.mean((0, 2, 3)).tolist()
    assert red < green < blue
    contrast = ice.std((2, 3)).mean(1)
    assert contrast.min() > 0.04 and contrast.max() < 0.14
    neighbours = torch.corrcoef(torch.stack((ice[:, 0, :, 1:].flatten(), ice[:, 0, :, :-1].flatten())))
    assert neighbours[0, 1] > 0.7  # crystals and haze, not pixel noise


def test_frost_mixes_image_and_ice():
    x = pictures(2)
    for severity, (image, ice) in enumerate(((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)), 1):
        expected = (image * x + ice * _textures.frost(x, seeded())).clamp(max=1)
        assert differences(levels(corrupt(x, "frost", severity)), levels(expected)).max() <= 1


# What every corruption promises. ------------------------------------------------------------------------------------


def test_names_are_the_benchmarks():
    assert len(CORRUPTIONS) == 15 and len(EXTRA) == 4
    assert list(CORRUPTIONS) == get_corruption_names("common") and set(EXTRA) == set(get_corruption_names("validation"))
    for table in TABLES.values():
        assert set(table) == set(ALL) and all(len(constants) == 5 for constants in table.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 1, 28, 28), (2, 3, 20, 33)])
@pytest.mark.parametrize("name", ALL)
def test_shape_dtype_range_levels_and_no_side_effect(name, shape, dtype):
    x = pictures(*shape[:2], *shape[2:]).to(dtype)
    before, state = x.clone(), torch.get_rng_state()
    for table in TABLES:
        y = corrupt(x, name, 5, table=table)
        assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous() and not y.requires_grad
        assert (y >= 0).all() and (y <= 1).all()
        level = y.double() * 255
        assert (level - level.round()).abs().max() < (0.07 if dtype == torch.float16 else 1e-4)
    assert torch.equal(x, before) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ALL)
def test_every_severity_differs_from_the_others_and_from_clean(name):
    x = pictures(2, 3, 32)
    versions = [x] + [corrupt(x, name, severity) for severity in SEVERITIES]
    equal = [(i, j) for j, b in enumerate(versions) for i, a in enumerate(versions[:j]) if torch.equal(a, b)]
    # Published as (6, 2) and (8, 2): the longer trail only adds weights six standard deviations out.
    assert equal == ([(3, 4)] if name == "motion_blur" else [])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "name", [name for name in ALL if "noise" in name] + ["contrast", "pixelate", "jpeg_compression"]
)
def test_distance_to_clean_grows_with_severity(name, table):
    x = torch.rand(16, 3, 32, 32, generator=seeded())  # no edge that could fit one pixel grid better than another
    error = [float((corrupt(x, name, severity, table=table) - x).square().mean()) for severity in SEVERITIES]
    assert error == sorted(error) and error[0] > 0


@pytest.mark.parametrize("name", ALL)
def test_seed_and_generator(name):
    x = pictures(2, 3, 32)
    first = corrupt(x, name, 3, seed=7)
    assert torch.equal(first, corrupt(x, name, 3, generator=seeded(7)))
    assert torch.equal(first, corrupt(x, name, 3, seed=8)) == (name in DETERMINISTIC)
    generator = seeded(7)
    again = [corrupt(x, name, 3, generator=generator) for _ in range(2)]
    assert torch.equal(again[0], first) and torch.equal(*again) == (name in DETERMINISTIC)  # the generator moves on


@pytest.mark.parametrize("name", ALL)
def test_images_do_not_mix(name):
    x = pictures(5, 3, 28)
    y = corrupt(x, name, 4)
    if name in DETERMINISTIC:
        assert all(torch.equal(y[i : i + 1], corrupt(x[i : i + 1], name, 4)) for i in range(5))
    changed = x.clone()
    changed[2] = 1 - changed[2]
    if name != "shot_noise":  # a Poisson draw takes as many random numbers as its rate asks for
        kept = [0, 1, 3, 4]
        assert torch.equal(corrupt(changed, name, 4)[kept], y[kept])
    same = corrupt(x[:1].expand(4, -1, -1, -1), name, 4)
    assert torch.equal(same[0], same[1]) == (name in DETERMINISTIC)  # equal images, each its own randomness


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", DETERMINISTIC + ("glass_blur", "motion_blur", "snow", "fog", "elastic_transform"))
def test_grey_is_the_first_of_three_equal_channels(name, severity):
    x = pictures(3, 1, 28)
    rgb = corrupt(x.expand(-1, 3, -1, -1), name, severity)
    assert differences(levels(corrupt(x, name, severity))[..., 0], levels(rgb)[..., 0]).max() <= (name == "snow")


def test_saturate_leaves_grey_alone():
    x = pictures(2, 1, 28)
    assert torch.equal(corrupt(x, "saturate", 5), x)


@pytest.mark.parametrize(
    "name", ["contrast", "brightness", "gaussian_blur", "defocus_blur", "zoom_blur", "glass_blur", "elastic_transform"]
)
def test_constant_levels_survive_round_off(name):
    level = torch.arange(256.0).view(256, 1, 1, 1).expand(256, 3, 9, 8)
    expected = (level + 51).clamp(max=255) if name == "brightness" else level
    assert torch.equal(corrupt(level / 255, name, 4), expected / 255)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((1, 1, 8, 8))}, TypeError, "x: expected a floating-point tensor"),
        ({"x": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"x": torch.zeros(1, 8, 8)}, ValueError, r"got \(1, 8, 8\)"),
        ({"x": torch.zeros(1, 2, 8, 8)}, ValueError, "1 or 3"),
        ({"x": torch.zeros(0, 1, 8, 8)}, ValueError, "N >= 1"),
        ({"x": torch.zeros(1, 1, 8, 7)}, ValueError, "W >= 8"),
        ({"x": torch.full((1, 1, 8, 8), 1.1)}, ValueError, r"values in \[0, 1\]"),
        ({"x": torch.full((1, 1, 8, 8), -0.1)}, ValueError, r"values in \[0, 1\]"),
        ({"x": torch.full((1, 1, 8, 8), float("nan"))}, ValueError, "nan"),
        ({"name": "rain"}, ValueError, "name: expected one of .* got 'rain'"),
        ({"name": ["fog"]}, ValueError, "name: expected"),
        ({"severity": 0}, ValueError, "severity: expected an integer from 1 to 5, got 0"),
        ({"severity": 6}, ValueError, "got 6"),
        ({"severity": 2.0}, TypeError, "severity: .* float"),
        ({"severity": True}, TypeError, "severity: .* bool"),
        ({"generator": np.random.default_rng(0)}, TypeError, "generator: expected"),
        ({"seed": 0.5}, TypeError, "seed: expected an integer"),
        ({"table": "tiny"}, ValueError, "table: expected one of cifar, imagenet, got 'tiny'"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"x": torch.zeros(1, 1, 8, 8), "name": "fog", "severity": 3} | change
    with pytest.raises(error, match=message):
        corrupt(**arguments)
