"""What each estimator lets its learner know: the table, column by column."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from peftref.panel.core.columns import Panel, read_panel
from peftref.panel.core.crossfit import crossfit
from peftref.panel.core.estimators import SETS, partial_out, transform, variables
from peftref.panel.core.folds import Folds, make_folds
from peftref.panel.core.ridge import PolynomialRidge

TOGETHER = ("pooled", "late", "cre", "cre_general", "cre_normal")  # these learn from the same panel
LEARNER = PolynomialRidge(2, 0.5)


def table(balanced: bool = False, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    unit, time = np.repeat(np.arange(12), 6), np.tile(np.arange(6), 12)
    df = pd.DataFrame({"unit": unit, "time": time} | {name: rng.normal(size=72) for name in ("y", "w", "x1", "x2")})
    df[["y", "w", "x1", "x2"]] += rng.normal(size=(12, 4))[unit] + 2
    return df if balanced else df[(rng.random(72) < 0.7) | (time < 2)].reset_index(drop=True)


def panel_of(df: pd.DataFrame, estimator: str = "cre") -> Panel:
    return read_panel(df["y"], df["w"], df[["x1", "x2"]], df["unit"], df["time"], estimator=estimator)[0]


def tensor(columns: object) -> Tensor:
    return torch.tensor(np.asarray(columns, dtype=float).T)


class Recorder:
    """Stands in for a cross-fit: notes what it is given, and predicts half of each target."""

    def __call__(self, z: Tensor, targets: Tensor, folds: Folds, *, uses: Sequence, **more: object) -> Tensor:
        self.z, self.targets, self.uses, self.more = z, targets, uses, more
        return targets / 2


def learned(estimators: Sequence[str], df: pd.DataFrame, twoway: bool = False) -> tuple[Recorder, dict]:
    panel = transform(estimators[0], panel_of(df), twoway)
    fit, folds = Recorder(), make_folds(panel.layout, 3)
    return fit, partial_out(estimators, panel, folds, fit, twoway=twoway)


@pytest.mark.parametrize("twoway", [False, True])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("estimator", TOGETHER)
def test_what_a_learner_knows(estimator: str, balanced: bool, twoway: bool) -> None:
    df = table(balanced)
    x = [df["x1"], df["x2"]]
    by = ("unit", "time") if twoway else ("unit",)
    x_means = [df.groupby(key)[name].transform("mean") for key in by for name in ("x1", "x2")]
    w_means = [df.groupby(key)["w"].transform("mean") for key in by]
    of_y, of_w = {
        "pooled": (x, x), "late": (x, x), "cre": (x + x_means + w_means,) * 2, "cre_general": (x + x_means,) * 2,
        "cre_normal": (x + x_means, x + x_means + w_means),
    }[estimator]  # fmt: skip
    fit, _ = learned([estimator], df, twoway)
    told = {"coarse": (fit.z.shape[1] - len(x), 12)} if estimator in ("cre", "cre_normal") else {}
    told = {"coarse": (fit.z.shape[1] - len(x), math.inf)} if estimator == "cre_general" else told
    assert len(fit.uses) == 2 and fit.more == told
    assert_close(fit.targets[0], tensor(df[["y", "w"]]))
    for used, expected in zip(fit.uses, (of_y, of_w), strict=True):
        assert_close(fit.z[0, used], tensor(np.stack(expected, 1)))


@pytest.mark.parametrize("balanced", [True, False])
def test_early_knows_what_varies_within_units(balanced: bool) -> None:
    df = table(balanced)
    columns = ["y", "w", "x1", "x2"]
    left = df[columns] - df.groupby("unit")[columns].transform("mean")
    for estimator in ("early", "fe", "fe_only"):
        made = transform(estimator, panel_of(df))
        assert_close(torch.cat((made.y, made.w, made.x[0])), tensor(left))
    fit, found = learned(["early"], df)
    assert_close(fit.z[0], tensor(left[["x1", "x2"]]))
    assert_close(found["early"][0][0], tensor(left["y"]) / 2)


def test_differences() -> None:
    df = table()
    before = df.assign(time=df["time"] + 1)
    both = df.merge(before, on=["unit", "time"], suffixes=("", "_before"))
    made = transform("fd", panel_of(df))
    assert_close(made.y[0], tensor(both["y"] - both["y_before"]))
    assert_close(made.w[0], tensor(both["w"] - both["w_before"]))
    assert_close(made.x[0], tensor(both[["x1", "x2", "x1_before", "x2_before"]]))
    assert (
        df.iloc[made.layout.order.numpy()][["unit", "time"]].values.tolist() == both[["unit", "time"]].values.tolist()
    )
    fit, _ = learned(["fd"], df)
    assert fit.uses == [[0, 1, 2, 3]] * 2 and fit.z.shape == (1, 4, len(both))


@pytest.mark.parametrize("estimator", TOGETHER + ("dummies",))
def test_the_others_learn_from_the_panel_as_it_is(estimator: str) -> None:
    panel = panel_of(table())
    assert all(a is b for a, b in zip(transform(estimator, panel), panel, strict=True))


@pytest.mark.parametrize("twoway", [False, True])
def test_dummies_are_units_and_a_few_columns_of_periods(twoway: bool) -> None:
    df = table()
    fit, _ = learned(["dummies"], df, twoway)
    assert torch.equal(fit.more["unit"], torch.tensor(df["unit"].to_numpy()))
    assert_close(fit.z[0, :2], tensor(df[["x1", "x2"]]))
    assert fit.more.get("linear") == (6 if twoway else None)
    if twoway:
        assert_close(fit.z[0, 2:], tensor(pd.get_dummies(df["time"])))
    assert fit.uses == [list(range(fit.z.shape[1]))] * 2


@pytest.mark.parametrize("twoway", [False, True])
def test_means_taken_from_residuals(twoway: bool) -> None:
    df = table(balanced=True)
    _, found = learned(TOGETHER, df, twoway)
    half = df[["y", "w"]] / 2  # what the recorder leaves
    means = half.groupby(df["unit"]).transform("mean")
    if twoway:
        means = means + half.groupby(df["time"]).transform("mean") - half.mean()
    u, v = tensor(half)
    late_u, late_v = tensor(half - means)
    for name in ("pooled", "cre", "cre_normal"):
        assert_close(found[name], (u[None], v[None]))
    assert_close(found["late"], (late_u[None], late_v[None]))
    # as a shift of the prediction:  m* = m + mean_i(w) - mean_i(m)
    shifted = half["w"] + 2 * means["w"] - means["w"]
    assert_close(found["cre_general"], (u[None], tensor(df["w"] - shifted)[None]))


def test_each_model_is_learned_once() -> None:
    fit, found = learned(TOGETHER, table())
    # Y on x, x and means, all; W the same: late shares with pooled, cre_normal with cre_general and with cre
    assert len(fit.uses) == fit.targets.shape[1] == 6 and list(found) == list(TOGETHER)


@pytest.mark.parametrize("twoway", [False, True])
def test_several_estimators_together_are_each_alone(twoway: bool) -> None:
    panel = panel_of(table())
    folds = make_folds(panel.layout, 3, repeats=2)

    def fit(z: Tensor, targets: Tensor, folds: Folds, **more: object) -> Tensor:
        return crossfit(z, targets, folds, LEARNER, **more)

    together = partial_out(TOGETHER, panel, folds, fit, twoway=twoway)
    for name in TOGETHER:
        alone = partial_out([name], panel, folds, fit, twoway=twoway)[name]
        assert alone[0].shape == (2, len(panel.layout))
        assert_close(together[name], alone, rtol=1e-9, atol=1e-10)


def test_datasets_together_are_each_alone() -> None:
    panels = [panel_of(table(balanced=True, seed=seed)) for seed in range(3)]
    layout = panels[0].layout
    batch = Panel(*(torch.cat([p[i] for p in panels]) for i in range(3)), layout)
    folds = make_folds(layout, 3, repeats=3)

    def fit(z: Tensor, targets: Tensor, folds: Folds, **more: object) -> Tensor:
        return crossfit(z, targets, folds, LEARNER, **more)

    for name in SETS:
        moved = transform(name, batch)
        of_rows = folds.select(torch.arange(len(layout)) % 6 > 0) if name == "fd" else folds
        together = partial_out([name], moved, of_rows, fit)[name]
        for b, panel in enumerate(panels):
            one = Folds(of_rows.fold[b : b + 1], folds.keep, folds.scheme)
            alone = partial_out([name], transform(name, panel), one, fit)[name]
            assert_close([t[b : b + 1] for t in together], list(alone), rtol=1e-8, atol=1e-9)


def test_only_what_is_wanted() -> None:
    panel = panel_of(table())
    z, places = variables(panel, "x")
    assert torch.equal(z, panel.x) and places == {"x": [0, 1]}
    z, places = variables(panel, "xbm", twoway=True)
    assert z.shape[1] == 2 + 4 + 2 and places == {"x": [0, 1], "b": [2, 3, 4, 5], "m": [6, 7]}
    assert list(variables(panel, "xm")[1]) == ["x", "m"]


def test_panels_are_left_alone() -> None:
    for name in SETS:
        panel = panel_of(table())
        before = [t.clone() for t in panel[:3]]
        moved = transform(name, panel)
        partial_out([name], moved, make_folds(moved.layout, 3), Recorder())
        assert all(map(torch.equal, panel[:3], before))


def test_useless_differences() -> None:
    df = table(balanced=True)
    with pytest.raises(ValueError, match="^time: expected rows in consecutive"):
        transform("fd", panel_of(df[df["time"] % 2 == df["unit"] % 2]))
    with pytest.raises(ValueError, match="^w: expected a treatment whose differences vary"):
        transform("fd", panel_of(df.assign(w=df["time"] * 2.0 + df["unit"])))
