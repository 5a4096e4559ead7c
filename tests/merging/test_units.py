"""Which tensors are layers: plain networks, residual networks, wrappers, heads, ties."""

from __future__ import annotations

import pytest
import timm
import torchvision
from torch import nn

from peftref.merging.core.units import first, units
from peftref.models import Normalised, SmallCNN


def flat(model: nn.Module) -> list[str]:
    return first(units(model), 10**6)


def test_vgg16_has_its_13_convolutions_with_their_biases() -> None:
    model = torchvision.models.vgg16(num_classes=10)
    convs = [name for name, p in model.named_parameters() if p.ndim == 4]
    found = units(model)
    assert len(found) == 13
    assert found == [[name, name.replace("weight", "bias")] for name in convs]


def test_vgg16_with_batchnorm_takes_the_normalisation_along() -> None:
    found = units(torchvision.models.vgg16_bn(num_classes=10))
    assert len(found) == 13
    assert found[0] == ["features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias"]


@pytest.mark.parametrize("make", [torchvision.models.resnet50, lambda: timm.create_model("resnet50")])
def test_resnet50_has_a_stem_and_16_blocks(make) -> None:
    model = make()
    found = units(model)
    assert len(found) == 17
    assert found[0] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert set(found[1]) == {n for n, _ in model.named_parameters() if n.startswith("layer1.0.")}
    assert any("downsample" in n for n in found[1])
    assert flat(model) == [n for n, _ in model.named_parameters() if not n.startswith("fc.")]


def test_basic_blocks_and_a_deep_stem() -> None:
    assert len(units(torchvision.models.resnet18())) == 1 + 8
    deep = units(timm.create_model("resnet18d"))  # its stem is three convolutions in a row
    assert len(deep) == 3 + 8 and deep[0][0] == "conv1.0.weight" and deep[2][-1] == "bn1.bias"


@pytest.mark.parametrize("wrap", [lambda m: Normalised(m, (0.5,), (0.5,)), lambda m: nn.Sequential(nn.Identity(), m)])
@pytest.mark.parametrize("make", [SmallCNN, torchvision.models.resnet18, lambda: torchvision.models.vgg11()])
def test_a_wrapper_changes_only_the_prefix(make, wrap) -> None:
    model = make()
    wrapped = wrap(model)
    prefix = next(n for n, m in wrapped.named_modules() if m is model)
    assert units(wrapped) == [[f"{prefix}.{name}" for name in unit] for unit in units(model)]


def test_written_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 2)  # registered first
            self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, bias=False)
            self.act = nn.PReLU()

    for model, prefix in ((Net(), ""), (nn.Sequential(Net()), "0.")):
        assert units(model) == [
            [f"{prefix}conv1.weight", f"{prefix}conv1.bias"],
            [f"{prefix}conv2.weight", f"{prefix}act.weight"],
        ]


def test_the_head_is_never_among_them() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert units(plain) == [["0.weight", "0.bias"]]
    squeeze = torchvision.models.squeezenet1_1()
    assert not any(name.startswith("classifier") for name in flat(squeeze))
    normed = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(5, 5), nn.BatchNorm2d(2), nn.Linear(5, 5))
    assert units(normed) == [["0.weight", "0.bias"]]
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()  # nothing to leave out
    assert len(units(backbone)) == 9


def test_no_running_statistics_and_each_tied_tensor_once() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    assert units(model) == [["0.weight", "0.bias", "1.weight", "1.bias"], ["2.bias"]]


def test_first() -> None:
    found = units(SmallCNN())
    assert first(found, 0) == []
    assert first(found, 2) == found[0] + found[1]
    assert first(found, 99) == [name for unit in found for name in unit] == first(found, len(found))
    for k in (-1, 1.5, "2"):
        with pytest.raises(ValueError, match="k: expected an integer >= 0"):
            first(found, k)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got OrderedDict"):
        units(SmallCNN().state_dict())
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Sequential()):
        with pytest.raises(ValueError, match="expected a convolution before the head"):
            units(model)


def test_a_unit_is_a_list_of_names() -> None:
    for bad in (["abc"], [[1]], [5]):
        with pytest.raises(TypeError, match="units: expected a list of names of tensors"):
            first(bad, 1)  # type: ignore[arg-type]
