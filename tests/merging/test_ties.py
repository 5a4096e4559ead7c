"""TIES against entry-by-entry Python, mergekit and PEFT; the exact selection over a whole model."""

from __future__ import annotations

import peft.utils.merge_utils as peft_merge
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor

from peftref.merging.baselines.ties import kept, ties, trim_thresholds
from peftref.merging.core.loop import delta, merge
from tests._naive.ties import published_ties


def states(n: int, seed: int = 0, decimals: int | None = None) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 7), "b": (11,), "c": (2, 2, 3)}
    made = [{k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in shapes.items()} for _ in range(n)]
    return made if decimals is None else [{k: v.round(decimals=decimals) for k, v in s.items()} for s in made]


@pytest.mark.parametrize("elect", ["mass", "count", "weighted"])
@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("keep", ["exact", "kth"])
def test_equal_to_the_naive_form(elect: str, combine: str, keep: str) -> None:
    base, *models = states(5)
    weights = [1.0, 0.5, 2.0, 0.25]
    rule = ties(0.4, 0.7, weights=weights, elect=elect, combine=combine, keep=keep)
    merged = merge(base, models, rule)
    for name, w0 in base.items():
        ws = [m[name].flatten().tolist() for m in models]
        k = kept(w0.numel(), 0.4, keep)
        expected = published_ties(w0.flatten().tolist(), ws, k, 0.7, weights, elect, combine)
        torch.testing.assert_close(merged[name].flatten(), torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.01, 1.0))
def test_naive_form_with_many_equal_magnitudes_and_cancelling_signs(seed: int, density: float) -> None:
    base, *models = states(4, seed, decimals=0)  # differences in -4 .. 4: ties and exact zeros everywhere
    merged = merge(base, models, ties(density))
    for name, w0 in base.items():
        k = kept(w0.numel(), density)
        expected = published_ties(w0.flatten().tolist(), [m[name].flatten().tolist() for m in models], k)
        torch.testing.assert_close(merged[name].flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_equal_to_peft(method: str) -> None:
    base, *models = states(4)
    for name, w0 in base.items():
        density = int(0.45 * w0.numel()) / w0.numel() + 1e-9  # a whole number: nobody has to round
        tau = [m[name] - w0 for m in models]
        peer = w0 + peft_merge.ties(tau, torch.ones(3), density, majority_sign_method=method)
        ours = ties(density, elect={"total": "mass", "frequency": "count"}[method])
        merged = merge({name: w0}, [{name: m[name]} for m in models], ours)[name]
        trimmed = torch.stack([peft_merge.magnitude_based_pruning(t, density) for t in tau])
        decided = trimmed.sign().sum(0) != 0 if method == "frequency" else torch.ones_like(w0, dtype=torch.bool)
        assert decided.float().mean() > 0.4
        torch.testing.assert_close(merged[decided], peer[decided])  # a draw of votes is + for PEFT


@pytest.mark.parametrize("normalise", [True, False])
def test_equal_to_mergekit(normalise: bool) -> None:
    base, *models = ({"w": s["a"]} for s in states(4))
    weights = [0.5, 1.5, 0.8]
    peer = merge_state_dicts(
        {"base": base, **{str(i): m for i, m in enumerate(models)}}, "ties", base="base",
        parameters={"weight": {str(i): w for i, w in enumerate(weights)}, "density": 0.4, "normalize": normalise},
    )  # fmt: skip
    rule = ties(0.4, weights=weights, elect="weighted", combine="mean" if normalise else "sum")
    torch.testing.assert_close(merge(base, models, rule)["w"], peer["w"])


def test_weights_do_not_elect_in_the_paper_but_do_in_mergekit() -> None:
    base, models = {"w": torch.zeros(1)}, [{"w": torch.tensor([1.0])}, {"w": torch.tensor([-0.6])}]
    assert merge(base, models, ties(1.0, weights=[1.0, 5.0]))["w"] == 1.0
    assert merge(base, models, ties(1.0, weights=[1.0, 5.0], elect="weighted"))["w"] == pytest.approx(-0.6)


def test_exact_cancellation_takes_the_sign_most_entries_elected() -> None:
    base = {"w": torch.zeros(4)}
    models = [{"w": torch.tensor([1.0, -2.0, -3.0, 1.0])}, {"w": torch.tensor([-1.0, -2.0, -3.0, 1.0])}]
    assert merge(base, models, ties(1.0))["w"].tolist() == [-1.0, -2.0, -3.0, 1.0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.001, 1.0), decimals=st.sampled_from([None, 0, 1]))
def test_thresholds_over_the_model_equal_a_sort(seed: int, density: float, decimals: int | None) -> None:
    base, *models = ({k: v.float() for k, v in s.items()} for s in states(4, seed, decimals))
    for keep in ("exact", "kth"):
        got = trim_thresholds(base, models, density, keep=keep)
        for threshold, model in zip(got, models, strict=True):
            sizes = torch.cat([d.flatten() for d in delta(model, base).values()]).abs().sort(descending=True).values
            assert threshold == sizes[kept(len(sizes), density, keep) - 1].item()


def test_scope_of_the_model_equals_the_tensor_scope_on_one_long_vector() -> None:
    base, *models = states(4)
    flat = [{"all": torch.cat([v.flatten() for v in s.values()])} for s in (base, *models)]
    whole = merge(flat[0], flat[1:], ties(0.3))["all"]
    merged = merge(base, models, ties(0.3, thresholds=trim_thresholds(base, models, 0.3)))
    torch.testing.assert_close(torch.cat([v.flatten() for v in merged.values()]), whole)
    assert not torch.allclose(torch.cat([v.flatten() for v in merge(base, models, ties(0.3)).values()]), whole)


def test_skipped_names_and_empty_models_have_no_threshold() -> None:
    base, model = states(2)
    short = trim_thresholds(base, [model], 0.5, skip=["a", "b"])
    assert short == trim_thresholds({"c": base["c"]}, [{"c": model["c"]}], 0.5)
    assert trim_thresholds({"n": torch.ones(2, dtype=torch.long)}, [{"n": torch.ones(2, dtype=torch.long)}]) == [0.0]


def test_small_tensors_keep_at_least_one_entry() -> None:
    base, model = (
        {"w": torch.zeros(3), "s": torch.tensor(0.0)},
        {"w": torch.tensor([1.0, -2.0, 0.5]), "s": torch.tensor(4.0)},
    )
    merged = merge(base, [model], ties(0.01))
    assert merged["w"].tolist() == [0.0, -2.0, 0.0] and merged["s"] == 4.0
    empty = {"w": torch.zeros(0, 3)}
    assert merge(empty, [empty], ties(0.2))["w"].shape == (0, 3)


def test_every_setting_changes_the_result() -> None:
    base, *models = ({k: v.float() for k, v in s.items()} for s in states(4))
    plain = merge(base, models, ties(0.4))["a"]
    for changed in (
        ties(0.6), ties(0.4, 0.5), ties(0.4, weights=[1.0, 2.0, 3.0]), ties(0.4, elect="count"),
        ties(0.4, combine="sum"), ties(0.4, combine="max"), ties(0.4, keep="kth"),
        ties(0.4, thresholds=[1.0, 0.1, 0.1]),
    ):  # fmt: skip
        assert not torch.equal(merge(base, models, changed)["a"], plain)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"density": 0.0}, r"density: expected a share in \(0, 1\], got 0.0"),
        ({"density": 1.1}, "density"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"elect": "sum"}, "elect: expected one of"),
        ({"combine": "median"}, "combine: expected one of"),
        ({"keep": "top"}, "keep: expected one of"),
    ],
)
def test_settings_out_of_range(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ties(**settings)


def test_wrong_numbers() -> None:
    base, *models = states(3)
    with pytest.raises(ValueError, match="weights: expected one for each of the 2 models, got 1"):
        merge(base, models, ties(weights=[1.0]))
    with pytest.raises(ValueError, match="thresholds: expected one for each of the 2 models, got 3"):
        merge(base, models, ties(thresholds=[1.0] * 3))
    with pytest.raises(ValueError, match="density"):
        trim_thresholds(base, models, 0.0)
