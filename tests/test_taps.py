"""Features of a model that runs itself: with its own forward, its hooks, and inside another."""

import pytest
import timm
import torch
from torch import Tensor, nn

from peftref._taps import features_of
from peftref.continual import FSA, LAE, embed
from peftref.models import Normalised, SmallCNN, ViT

X = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


class Halving(SmallCNN):
    """Normalises by itself, and scales its logits."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x / 2)


def halving() -> SmallCNN:
    torch.manual_seed(0)
    return Halving().eval()


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(x), pre_logits=True)


def test_an_own_forward_decides_what_the_features_are_of() -> None:
    model = halving()
    expected = plain(model, X / 2).flatten(1)
    torch.testing.assert_close(embed(model, X), expected)
    assert not torch.allclose(plain(model, X).flatten(1), expected)
    fsa = FSA(model, "none")
    fsa.observe(X, torch.arange(6) % 2)
    torch.testing.assert_close(fsa.head.moments.means.double(), expected.reshape(3, 2, -1).mean(0).double())
    assert "forward_head" not in vars(model)


def test_hooks_before_the_model_count() -> None:
    torch.manual_seed(0)
    model = SmallCNN().eval()
    expected = embed(model, X / 2)
    model.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    torch.testing.assert_close(embed(model, X), expected)
    torch.testing.assert_close(embed(Normalised(model, (0.5,), (2.0,)), 2 * X + 0.5), embed(model, X))


def test_an_lae_learns_from_those_features() -> None:
    from peftref.adapters import LoRA, inject

    class OwnForward(ViT):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 2)

    torch.manual_seed(0)
    model = OwnForward(num_classes=2, embed_dim=16, depth=1, num_heads=2)
    inject(model, LoRA, ["qkv"], name="online", r=2)
    features = LAE(model, alpha=0.9, lr=0.1).features(X)
    torch.testing.assert_close(features, plain(model, X / 2))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"])
def test_timms_models_give_what_timm_gives(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(features_of(model, x), plain(model, x), rtol=0, atol=0)


def test_two_halves_without_a_forward_are_called() -> None:
    class Halves(nn.Module):
        def forward_features(self, x: Tensor) -> Tensor:
            return x.flatten(1)

        def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
            return 2 * h if pre_logits else h[:, :1]

    torch.testing.assert_close(embed(Halves(), X), 2 * X.flatten(1))


def test_a_head_that_is_not_called_is_refused() -> None:
    class Other(SmallCNN):
        def forward(self, x: Tensor) -> Tensor:
            return self.forward_features(x)

    with pytest.raises(ValueError, match="model: expected a forward that calls forward_head, got a Other"):
        features_of(Other(), X)


def test_whatever_fails_the_model_is_left_as_it_was() -> None:
    model = halving()
    with pytest.raises(RuntimeError):
        features_of(model, X[:, :, 0])
    assert "forward_head" not in vars(model)
