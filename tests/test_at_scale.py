"""What runs with large backbones share, on small stand-ins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftref.at_scale import Resized, first_of_each, pick_device, protocol, random_crop, shifted_crop


class Seeing(nn.Module):
    """Remembers what it saw; speaks timm's protocol."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x.mean((2, 3))

    def forward_head(self, h: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return h if pre_logits else self.fc(h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def test_images_of_the_right_size_pass_and_others_are_enlarged() -> None:
    model = Seeing()
    resized = Resized(model, 8)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(resized(x), model(x))
    assert torch.equal(model.seen, x)
    small = torch.rand(2, 1, 4, 4)
    resized(small)
    expected = F.interpolate(small.expand(-1, 3, -1, -1), (8, 8), mode="bicubic").clamp(0, 1)
    torch.testing.assert_close(model.seen, expected)
    assert resized.head is model.fc and resized.num_features == 3
    torch.testing.assert_close(resized.forward_head(resized.forward_features(x)), model(x))


def test_the_middle_of_a_larger_image_is_kept() -> None:
    model = Seeing()
    x = torch.rand(1, 3, 10, 10)
    Resized(model, 7, cut=8 / 7, mode="bilinear")(x)
    large = F.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.seen, large[..., :7, :7])


def test_shifted_crop_against_a_loop() -> None:
    x = torch.arange(12 * 2 * 6 * 7.0).view(12, 2, 6, 7) + 1
    found = shifted_crop(x, torch.Generator().manual_seed(0), pad=2)
    generator = torch.Generator().manual_seed(0)
    down, right = torch.randint(5, (2, 12, 1), generator=generator)
    mirror = torch.rand(12, 1, generator=generator) < 0.5
    padded = F.pad(x, (2, 2, 2, 2))
    for n in range(12):
        a, b = int(down[n]), int(right[n])
        cut = padded[n, :, a : a + 6, b : b + 7]
        assert torch.equal(found[n], cut.flip(-1) if mirror[n] else cut)
    assert mirror.any() and not mirror.all()
    assert shifted_crop((x / 1100 * 255).to(torch.uint8), torch.Generator().manual_seed(0)).dtype == torch.uint8


def test_random_crop_of_everything_is_the_image_or_its_mirror() -> None:
    x = torch.rand(6, 3, 16, 16)
    found = random_crop(x, 16, torch.Generator().manual_seed(0), smallest=1.0)
    for image, cut in zip(x, found, strict=True):  # the aspect may still cut a side
        assert cut.shape == image.shape and cut.min() >= image.min() - 1e-5 and cut.max() <= image.max() + 1e-5
    again = random_crop(x, 16, torch.Generator().manual_seed(0), smallest=1.0)
    assert torch.equal(found, again) and not torch.equal(found, random_crop(x, 16, torch.Generator().manual_seed(1)))
    constant = torch.full((3, 1, 8, 8), 0.25)
    torch.testing.assert_close(random_crop(constant, 5, torch.Generator()), torch.full((3, 1, 5, 5), 0.25))


def test_first_of_each() -> None:
    assert first_of_each(torch.tensor([2, 0, 2, 0, 0, 5]), 2).tolist() == [0, 1, 2, 3, 5]
    assert first_of_each(torch.empty(0, dtype=torch.long), 2).tolist() == []
    with pytest.raises(ValueError, match="count: expected an integer >= 1, got 0"):
        first_of_each(torch.tensor([1]), 0)


def test_device_and_protocol() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    said = protocol(torch.device("cpu"), steps=3)
    assert said == {"steps": 3, "torch": torch.__version__, "device": "cpu"}
