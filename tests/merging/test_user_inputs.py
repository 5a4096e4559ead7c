"""Codes of quantised weights under the names that libraries give them; patches on models that change under them."""

import pytest
import torch
from torch import nn

from peftref.merging import Patched, average, merge, ties


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        ("weight._data", "weight._scale"), ("_weight_qdata", "_weight_scale"), ("qdata", "scale"),
        ("weight", "weight_scale_inv"), ("weight", "absmax"), ("weight", "descale"), ("weight", "weight_amax"),
    ],
)  # fmt: skip
def test_float8_codes_with_scales_of_their_own_are_refused(codes: str, scale: str) -> None:
    def state(size: float) -> dict[str, torch.Tensor]:
        w = size * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        unit = w.abs().max() / 448
        return {f"fc.{codes}": (w / unit).round().to(torch.float8_e4m3fn), f"fc.{scale}": unit[None]}

    a, b = state(1), state(10)
    b[f"fc.{codes}"] = (b[f"fc.{codes}"].float() / 2).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="fc"):
        merge(a, [a, b], average())
    assert merge(a, [a, a], average()).keys() == a.keys()


def test_codes_that_are_equal_may_have_nan() -> None:
    state = {"f": torch.tensor([complex(float("nan"), 1), 1j]), "w": torch.ones(2)}
    assert torch.equal(merge(state, [state], average())["w"], state["w"])


def test_a_patch_is_not_taken_off_other_tensors() -> None:
    norm = nn.BatchNorm1d(2)
    patched = Patched(norm, {"running_mean": torch.ones(2)}).on()
    norm.double()
    with pytest.raises(RuntimeError, match="model: expected the tensors it had, got others for running_mean"):
        patched.off()
    assert patched.strength == 1


@pytest.mark.parametrize("wrong", [0.5, "2", [None], ["2"], [float("nan")], [True], [-1.0]])
def test_thresholds_of_ties_are_magnitudes(wrong: object) -> None:
    with pytest.raises(ValueError, match="thresholds: expected magnitudes >= 0, one for each model, got"):
        ties(0.5, thresholds=wrong)
    ties(0.5, thresholds=[0.0, float("inf"), torch.tensor(0.5)])
