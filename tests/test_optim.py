"""The frame of an optimiser, by a rule that keeps one number for each weight: what is checked when, and kept how."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from peftref._checks import number
from peftref.optim import ForeachOptimizer


class Summing(ForeachOptimizer):
    """w <- w - lr g, and a sum of all gradients."""

    kept = ("sum",)

    def __init__(self, params, lr=0.5):
        self.calls = []
        super().__init__(params, {"lr": lr})

    def check(self, group):
        number("lr", group["lr"], 0.0)

    def update(self, w, g, state, group):
        self.calls.append(len(w))
        torch._foreach_add_(state["sum"], [t.to(s.dtype) for t, s in zip(g, state["sum"], strict=True)])
        torch._foreach_add_(w, g, alpha=-group["lr"])


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p


def test_a_step_moves_what_has_a_gradient_and_keeps_zeros_of_the_rest():
    a, b, idle = parameter(1.0, 2.0), parameter(3.0), parameter(4.0)
    idle.grad = None
    optimizer = Summing([a, b, idle])
    optimizer.step()
    optimizer.step()
    assert_close(a.data, torch.tensor([0.0, 1.0]))
    assert_close(optimizer.state[b]["sum"], torch.tensor([2.0]))
    assert idle.item() == 4.0 and idle not in optimizer.state
    assert optimizer.calls == [2, 2]  # all of one device and type at once


def test_tensors_of_different_types_are_updated_apart():
    a, b = parameter(1.0, dtype=torch.float64), parameter(1.0, dtype=torch.bfloat16)
    optimizer = Summing([a, b])
    optimizer.step()
    assert optimizer.calls == [1, 1]
    assert optimizer.state[a]["sum"].dtype == torch.float64 and optimizer.state[b]["sum"].dtype == torch.float32


def test_a_sparse_gradient_counts_as_the_dense_one():
    p = parameter(1.0, 1.0)
    p.grad = torch.tensor([0.0, 2.0]).to_sparse()
    Summing([p]).step()
    assert_close(p.data, torch.tensor([1.0, 0.0]))


def test_a_refused_group_leaves_nothing_behind():
    optimizer = Summing([parameter(1.0)])
    with pytest.raises(ValueError, match="lr: expected a finite number >= 0"):
        optimizer.add_param_group({"params": [parameter(2.0)], "lr": -1.0})
    with pytest.raises(TypeError, match="params: expected real tensors"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError):
        Summing([parameter(1.0)], lr=float("nan"))


def test_settings_are_checked_before_the_closure_runs_and_before_anything_moves():
    a, b, ran = parameter(1.0), parameter(1.0), []
    optimizer = Summing([{"params": [a]}, {"params": [b], "lr": 0.1}])
    optimizer.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError):
        optimizer.step(lambda: ran.append(1))
    assert a.item() == 1.0 and not ran


def test_a_closure_runs_with_gradients_and_its_result_is_returned():
    p = parameter(3.0)
    optimizer = Summing([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_kept_goes_on_in_its_precision_after_loading(dtype):
    p = parameter(1.0, dtype=dtype)
    optimizer = Summing([p])
    for _ in range(300):  # 256 + 1 is 256 in bfloat16
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    other = Summing([parameter(1.0, dtype=dtype)])
    other.load_state_dict(state)
    (value,) = (s["sum"] for s in other.state.values())
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and value.item() == 300
    value.zero_()
    assert optimizer.state[p]["sum"].item() == 300  # loaded as a copy


def test_a_rule_has_to_say_what_it_checks_and_does():
    with pytest.raises(NotImplementedError):
        ForeachOptimizer([parameter(1.0)], {})
