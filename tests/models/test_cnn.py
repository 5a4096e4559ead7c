"""Backbones: shapes, timm's protocol, the shipped weights on real test images, training, normalisation moved inside."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.transforms.functional import normalize

from peftref.data import load
from peftref.fitting import fit, predict
from peftref.models import Normalised, PlainCNN, SmallCNN, from_timm, pretrained
from peftref.models.cnn import SEEDS


def images(n: int, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def small(seed: int = 0, **options) -> SmallCNN:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallCNN(**options)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 4), channels=st.sampled_from([1, 3]), classes=st.integers(1, 12), width=st.integers(1, 6),
    height=st.integers(8, 33), side=st.integers(8, 33),
)  # fmt: skip
def test_shapes_and_protocol(n, channels, classes, width, height, side):
    net = small(in_chans=channels, num_classes=classes, width=width).eval()
    x = torch.rand(n, channels, height, side)
    h = net.forward_features(x)
    assert h.shape == (n, 4 * width, -(-height // 8), -(-side // 8))
    pooled = net.forward_head(h, pre_logits=True)
    assert pooled.shape == (n, net.num_features) == (n, 4 * width)
    assert net(x).shape == (n, classes)
    assert torch.equal(net(x), net.forward_head(h)) and torch.equal(net(x), net.fc(pooled))


def test_layout_of_the_small_network():
    """Five convolutions without bias, each followed by BatchNorm: what the chapters count on."""
    net = small(width=16)
    assert [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == [16, 16, 32, 32, 64]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 5
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    counted: list[int] = []
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        conv.register_forward_hook(lambda m, _, out: counted.append(out.numel() * m.weight[0].numel()))
    net.eval()(torch.rand(1, 1, 28, 28))
    assert sum(counted) == pytest.approx(1.6e6, rel=0.1)  # as its docstring says


@pytest.mark.parametrize(("channels", "width"), [(1, 4), (3, 2)])
def test_plain_network_is_the_small_one_without_normalisation(channels, width):
    peer = small(in_chans=channels, num_classes=7, width=width).eval()
    net = PlainCNN(channels, 7, width).eval()
    for (conv, _), (other, norm, _) in zip(net.stages, peer.stages, strict=True):
        norm.running_var.fill_(1 - norm.eps)  # with mean 0: the identity, and then a bias
        nn.init.normal_(norm.bias)
        conv.load_state_dict({"weight": other.weight, "bias": norm.bias})
    net.fc.load_state_dict(peer.fc.state_dict())
    x = images(3, channels, 28)
    assert_close(net(x), peer(x))
    h = net.forward_features(x)
    assert torch.equal(net(x), net.forward_head(h))
    assert torch.equal(net(x), net.fc(net.forward_head(h, pre_logits=True)))
    assert net.num_features == 4 * width and not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_plain_network_starts_with_signals_of_one_size():
    """Kaiming's initialisation: without BatchNorm, PyTorch's own would let the signal fade by 6 in each layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PlainCNN(width=32)
    x = images(4, 1, 64)
    assert 0.2 < net.forward_features(x).square().mean() / x.square().mean() < 5


# --- shipped weights --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "bound"), [("fashion8k", 16.0), ("mnist5k", 4.0)])
def test_pretrained_error_on_test_images(name, bound, seed):
    """Good where they come from, and not so good that test images must have leaked."""
    x, y = load(name).test
    net = pretrained(name, seed)
    assert not net.training and all(p.dtype == torch.float32 for p in net.parameters())
    error = 100 * (predict(net, x).argmax(-1) != y).float().mean().item()
    assert bound / 8 < error < bound


def test_pretrained_seeds_differ():
    x = load("fashion8k").test.x[:10]
    outs = [predict(pretrained("fashion8k", s), x) for s in SEEDS]
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    assert torch.equal(outs[0], predict(pretrained("fashion8k"), x))


@pytest.mark.parametrize(("name", "seed"), [("fashion", 0), ("fashion8k", 7), ("", 0), ("imagenet", 0)])
def test_pretrained_names_what_is_there(name, seed):
    with pytest.raises(ValueError, match=f"name, seed: .*'fashion8k_0'.*'mnist5k_2'.* got '{name}' and {seed}"):
        pretrained(name, seed)


# --- training and predicting ------------------------------------------------------------------------------------------
def stripes(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes: horizontal and vertical stripes, in noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=g)
    wave = (torch.arange(12) // 2 % 2).float()
    x = torch.where(y.view(-1, 1, 1) == 0, wave[:, None], wave[None, :])[:, None]
    return (0.5 * x + 0.5 * torch.rand(n, 1, 12, 12, generator=g)), y


def test_fit_learns_and_is_deterministic():
    x, y = stripes()
    kept = x.clone()
    nets = [fit(small(num_classes=2, width=4), x, y, epochs=12, batch_size=20, seed=s) for s in (0, 0, 1)]
    a, b, c = (list(net.state_dict().values()) for net in nets)
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))
    held_out, labels = stripes(seed=1)
    assert (predict(nets[0], held_out).argmax(-1) == labels).float().mean() > 0.95
    assert not nets[0].training and torch.equal(x, kept)


def test_fit_leaves_torchs_random_state_alone():
    x, y = stripes(40)
    net, before = small(num_classes=2, width=2), torch.get_rng_state()
    assert fit(net, x, y, epochs=1, batch_size=20) is net
    assert torch.equal(torch.get_rng_state(), before)


def test_every_setting_of_fit_matters():
    x, y = stripes(60)

    def weights(**options) -> Tensor:
        return fit(small(num_classes=2, width=2), x, y, **{"epochs": 1, "batch_size": 20} | options).fc.weight.detach()

    usual = weights()
    for change in ({"epochs": 2}, {"lr": 1e-3}, {"batch_size": 30}, {"seed": 1}):
        assert not torch.allclose(weights(**change), usual), change


@pytest.mark.parametrize(("n", "m"), [(3, 2), (0, 0)])
def test_fit_refuses_unequal_or_no_data(n, m):
    net = small()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"x, y: expected .* got {n} and {m}"):
        fit(net, torch.rand(n, 1, 12, 12), torch.zeros(m, dtype=torch.long))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_predict_is_the_model_in_one_piece(batch_size):
    net = small(in_chans=3).eval()
    assert_close(predict(net, images(7), batch_size), net(images(7)).detach())


# --- timm -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),  # mean and std 0.5
        ("resnet18", {"layers": (1, 1, 1, 1), "block": timm.models.resnet.BasicBlock}),  # those of ImageNet
    ],
)
def test_from_timm_is_the_model_on_normalised_images(name, options):
    """The mean and standard deviation are the tag's own, and the weights are those timm made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = from_timm(name, num_classes=4, **options)
        torch.manual_seed(0)
        peer = timm.create_model(name, num_classes=4, pretrained=False, **options).eval()
    nn.init.normal_(peer.get_classifier().weight)
    ours.model.load_state_dict(peer.state_dict())
    assert ours.mean.flatten().tolist() == pytest.approx(peer.pretrained_cfg["mean"])
    assert ours.std.flatten().tolist() == pytest.approx(peer.pretrained_cfg["std"])
    x = images(3)
    with torch.no_grad():
        assert_close(ours(x), peer(normalize(x, peer.pretrained_cfg["mean"], peer.pretrained_cfg["std"])))
        h = ours.forward_features(x)
        assert torch.equal(ours(x), ours.forward_head(h))
        assert_close(ours.forward_head(h, pre_logits=True), peer.forward_head(h, pre_logits=True))
    assert not any(m.training for m in ours.modules())


def test_the_two_tags_really_differ():
    a, b = from_timm("vit_tiny_patch16_224", depth=1), from_timm("resnet10t")
    assert not torch.equal(a.mean, b.mean) and not torch.equal(a.std, b.std)


def test_from_timm_reads_a_checkpoint(tmp_path):
    options = {"num_classes": 4, "img_size": 32, "depth": 1}
    saved = timm.create_model("vit_tiny_patch16_224", **options)
    nn.init.normal_(saved.head.weight)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    loaded = from_timm("vit_tiny_patch16_224", checkpoint=tmp_path / "model.safetensors", **options)
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in loaded.model.state_dict().items())


def test_from_timm_bad_name():
    with pytest.raises(RuntimeError, match="Unknown model"):
        from_timm("resnet_that_is_not")


def test_normalised_moves_with_the_model():
    net = Normalised(small(in_chans=3), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)).double().eval()
    x = images(2).double()
    assert net(x).dtype == torch.double and {"mean", "std"} <= set(net.state_dict())
    assert_close(net(x), net.model((x - net.mean) / net.std))


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_from_timm_normalises_as_many_channels_as_the_model_has(channels):
    """Averages for grey images, repeated in turn for more: as timm's filters of the first layer."""
    net = from_timm("resnet10t", in_chans=channels)
    mean, std = (torch.tensor(timm.data.resolve_data_config({}, model=net.model)[k]) for k in ("mean", "std"))
    turn = torch.arange(channels) % 3
    expected = (mean.mean()[None], std.mean()[None]) if channels == 1 else (mean[turn], std[turn])
    torch.testing.assert_close((net.mean.flatten(), net.std.flatten()), expected)
    x = torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (t.view(1, -1, 1, 1) for t in expected)
    torch.testing.assert_close(net(x), net.model((x - mean) / std))


def test_normalised_uses_the_forward_and_the_hooks_of_its_model():
    net = SmallCNN(width=4).eval()
    net.register_forward_hook(lambda _m, _i, out: out / 2)
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Normalised(net, (0.5,), (0.2,))(x), net((x - 0.5) / 0.2), rtol=0, atol=1e-6)


def test_normalised_refuses_what_is_no_image_in_the_range():
    net = Normalised(SmallCNN(3, width=4), (0.5,) * 3, (0.2,) * 3)
    for call in (net, net.forward_features):
        with pytest.raises(TypeError, match="x: expected float images in .* got torch.uint8"):
            call(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    for mean, std in (((0.5,) * 3, (0.2,)), ((), ()), ((0.5,), (0.0,))):
        with pytest.raises(ValueError, match="mean, std: expected"):
            Normalised(SmallCNN(), mean, std)
