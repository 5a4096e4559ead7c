"""LAME: the loop twin, closed forms, peers (scikit-learn, scipy), invariances, broken input, the wrapper's contract."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.tta import LAME, Neighbours, affinity, energy, lame, laplacian_assign
from peftref.tta.core import graphs
from tests._naive import lame as naive

KINDS = ("knn", "rbf", "linear")


def problem(n: int = 12, d: int = 6, classes: int = 4, seed: int = 0, dtype=torch.double) -> tuple[Tensor, Tensor]:
    """Clustered features and log-probabilities that agree with the clusters most of the time."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    centres = torch.randn(classes, d, generator=g, dtype=torch.double)
    features = centres[y] + 0.4 * torch.randn(n, d, generator=g, dtype=torch.double)
    logits = torch.randn(n, classes, generator=g, dtype=torch.double)
    logits[torch.arange(n), y] += 1.0
    return features.to(dtype), logits.to(dtype).log_softmax(-1)


def dense(w: Neighbours | Tensor) -> Tensor:
    return w.dense() if isinstance(w, Neighbours) else w


# --- the loop twin and the published schedule -------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9), d=st.integers(1, 5), classes=st.integers(1, 5), k=st.integers(1, 10),
    kind=st.sampled_from(KINDS), strength=st.sampled_from([0.0, 0.3, 1.0, 2.5]), seed=st.integers(0, 999),
)  # fmt: skip
def test_equals_the_loops(n, d, classes, k, kind, strength, seed):
    features, log_q = problem(n, d, classes, seed)
    features += torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) * 1e-2  # d = 1: only two directions
    w = affinity(features, kind, k)
    expected = torch.tensor(naive.loop_affinity(features.tolist(), kind, k), dtype=torch.double).view(n, n)
    if d > 1 or kind == "linear":  # normalised scalars are all ties
        assert_close(dense(w), expected, rtol=1e-9, atol=1e-9)
    ours = laplacian_assign(log_q, w, strength)
    z, energies = naive.loop_assign(log_q.tolist(), dense(w).tolist(), strength)
    assert ours.iterations == len(energies)  # the stopping rule of the published code, to the iteration
    assert_close(ours.z, torch.tensor(z, dtype=torch.double), rtol=1e-9, atol=1e-12)
    assert_close(ours.energies, torch.tensor(energies, dtype=torch.double), rtol=1e-9, atol=1e-9)
    assert_close(ours.log_z.exp(), ours.z)
    assert_close(
        energy(ours.z, log_q, w, strength).item(), naive.loop_energy(z, log_q.tolist(), dense(w).tolist(), strength)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_published_schedule(kind):
    features, log_q = problem(40, 16, 7)
    z, energies = naive.published_assign(log_q.exp(), naive.published_affinity(features, kind, 5))
    ours = laplacian_assign(log_q, affinity(features, kind), floor=1e-10)
    assert_close(ours.z, z, rtol=0, atol=1e-12)
    assert_close(ours.energies, torch.tensor(energies, dtype=torch.double), rtol=1e-10, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2), n=st.integers(0, 6), d=st.integers(1, 4), classes=st.integers(1, 4),
    kind=st.sampled_from(KINDS), symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)  # fmt: skip
def test_any_shape_and_dtype(lead, n, d, classes, kind, symmetric, dtype):
    g = torch.Generator().manual_seed(n)
    features = torch.randn(*lead, n, d, generator=g).to(dtype)
    log_q = torch.randn(*lead, n, classes, generator=g).to(dtype).log_softmax(-1)
    result = laplacian_assign(log_q, affinity(features, kind, 3, symmetric=symmetric))
    assert result.z.shape == (*lead, n, classes) and result.iterations.shape == tuple(lead)
    assert result.z.dtype == result.log_z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(result.z.sum(-1), torch.ones(*lead, n, dtype=result.z.dtype))
    half = dtype in (torch.float16, torch.bfloat16)
    if half:  # the same numbers, held in float32, give the same result to the bit
        again = laplacian_assign(log_q.float(), affinity(features.float(), kind, 3, symmetric=symmetric))
        assert torch.equal(again.z, result.z)


def test_autocast_does_not_lower_the_precision():
    features, log_q = problem(64, 32, 10, dtype=torch.float32)
    for kind in KINDS:
        plain = laplacian_assign(log_q, affinity(features, kind)).z
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(laplacian_assign(log_q, affinity(features, kind)).z, plain)


# --- closed forms and limiting cases ----------------------------------------------------------------------------------
def test_no_strength_or_no_links_gives_q_back():
    features, log_q = problem()
    for w, strength in ((affinity(features), 0.0), (torch.zeros(12, 12), 1.0)):
        assert_close(laplacian_assign(log_q, w, strength).z, log_q.exp(), rtol=0, atol=1e-15)


def test_one_class_is_certain():
    features, _ = problem()
    assert torch.equal(laplacian_assign(torch.zeros(12, 1), affinity(features)).z, torch.ones(12, 1))


def test_self_affinity_only_sharpens():
    _, log_q = problem()
    c = 0.7
    z = laplacian_assign(log_q, c * torch.eye(12), tolerance=0.0).z
    assert_close(z, (log_q + c * z).softmax(-1), rtol=0, atol=1e-7)  # E is flat at its minimum: 1e-16 there, 1e-8 here
    assert torch.equal(z.argmax(-1), log_q.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_monitor_is_the_minimum_of_the_majoriser(kind, strength):
    features, log_q = problem(20)
    w = affinity(features, kind, symmetric=True)
    old = log_q.exp()
    for n, monitored in enumerate(laplacian_assign(log_q, w, strength).energies, start=1):
        z = laplacian_assign(log_q, w, strength, max_iterations=n).z
        majoriser = (z * (z.log() - log_q)).sum() - strength * (z * (w @ old)).sum()  # eq-lame-majoriser, written out
        assert_close(monitored, majoriser, rtol=0, atol=1e-10)
        old = z


@pytest.mark.parametrize("kind", KINDS)
def test_objective_falls_and_the_bound_lies_between(kind):
    """E(Z_n+1) <= E_n + lambda/2 tr(Z_n' W Z_n) <= E(Z_n): the monitor plus the tangent's constant is the bound."""
    for seed in range(5):
        features, log_q = problem(20, seed=seed)
        w = affinity(features, kind, symmetric=True)
        result = laplacian_assign(log_q, w)
        zs = [log_q.exp()] + [laplacian_assign(log_q, w, max_iterations=n + 1).z for n in range(result.iterations)]
        objective = torch.stack([energy(z, log_q, w) for z in zs])
        bound = result.energies + torch.stack([(z * (w @ z)).sum() / 2 for z in zs[:-1]])
        assert (bound <= objective[:-1] + 1e-9).all() and objective[-1] < objective[0]
        if kind == "knn":  # symmetric but indefinite: the tangent is no bound, E falls all the same
            assert (objective.diff() <= 1e-9).all()
        else:
            assert (objective[1:] <= bound + 1e-9).all()


def test_monitor_alone_may_rise():
    batches = [problem(20, seed=seed) for seed in range(5)]
    rises = [laplacian_assign(log_q, affinity(features, "rbf")).energies.diff().max() for features, log_q in batches]
    assert max(rises) > 1e-3


def test_raw_knn_is_where_the_guarantee_ends():
    """Neither symmetric nor positive semi-definite: the proof does not apply, and E does go up for some batch."""
    rises = 0
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(10, 4, generator=g, dtype=torch.double)
        log_q = torch.randn(10, 3, generator=g, dtype=torch.double).log_softmax(-1)
        w = affinity(features, k=2)
        zs = [log_q.exp()] + [laplacian_assign(log_q, w, max_iterations=n).z for n in range(1, 12)]
        rises += bool((torch.stack([energy(z, log_q, w) for z in zs]).diff() > 1e-6).any())
    assert rises > 0


@pytest.mark.parametrize("kind", KINDS)
def test_stationary_point_of_the_objective(kind):
    """KKT: on the simplex the gradient of E is the same for all classes of a sample."""
    features, log_q = problem()
    w = affinity(features, kind, symmetric=True)
    z = laplacian_assign(log_q, w, strength=0.5, tolerance=1e-14).z.requires_grad_()
    (gradient,) = torch.autograd.grad(energy(z, log_q, w, 0.5), z)
    spread = gradient.amax(-1) - gradient.amin(-1)
    assert spread.max() < 1e-4
    q = log_q.exp().requires_grad_()
    (away,) = torch.autograd.grad(energy(q, log_q, w, 0.5), q)
    assert (away.amax(-1) - away.amin(-1)).max() > 1e-2  # and the test can tell


@pytest.mark.parametrize("q", [0.35, 0.6, 0.9])
@pytest.mark.parametrize("w", [0.5, 1.5, 3.0])
def test_two_samples_solve_a_scalar_equation(q, w):
    """logit z = logit q + w (2z - 1), the root on the side of q."""
    pair = torch.tensor([[0.0, w], [w, 0.0]], dtype=torch.double)
    log_q = torch.tensor([[q, 1 - q]] * 2, dtype=torch.double).log()
    z = laplacian_assign(log_q, pair, tolerance=0.0, max_iterations=500).z[0, 0].item()

    def residual(t: float) -> float:
        return math.log(t / (1 - t)) - math.log(q / (1 - q)) - w * (2 * t - 1)

    low, high = (0.5, 1 - 1e-15) if q > 0.5 else (1e-15, 0.5)
    assert z == pytest.approx(brentq(residual, low, high, xtol=1e-14), abs=1e-10)


@pytest.mark.parametrize(("w", "leaves"), [(1.9, False), (2.1, True)])
def test_pitchfork_at_two(w, leaves):
    """At q = 1/2 the undecided point is stable below w = 2 and not above."""
    log_q = torch.tensor([[0.5 + 1e-6, 0.5 - 1e-6]] * 2, dtype=torch.double).log()
    pair = torch.tensor([[0.0, w], [w, 0.0]], dtype=torch.double)
    z = laplacian_assign(log_q, pair, tolerance=0.0, max_iterations=1000).z[0, 0].item()
    assert (abs(z - 0.5) > 0.1) == leaves
    even = torch.full((2, 2), 0.5, dtype=torch.double).log()
    assert_close(laplacian_assign(even, pair).z, even.exp())  # exactly undecided stays so


def test_update_is_the_constrained_minimiser_of_the_majoriser():
    _, log_q = problem(3, classes=3)
    w = torch.tensor([[1.0, 0.6, 0.1], [0.6, 1.0, 0.3], [0.1, 0.3, 1.0]], dtype=torch.double)
    votes = (w @ log_q.exp()).numpy()

    def majoriser(flat: np.ndarray) -> float:
        z = flat.reshape(3, 3)
        return float((z * (np.log(z) - log_q.numpy() - votes)).sum())

    simplex = {"type": "eq", "fun": lambda flat: flat.reshape(3, 3).sum(1) - 1}
    found = minimize(
        majoriser, np.full(9, 1 / 3), method="SLSQP", bounds=[(1e-9, 1)] * 9, constraints=simplex,
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    ours = laplacian_assign(log_q, w, max_iterations=1)
    assert_close(ours.z, torch.from_numpy(found.x.reshape(3, 3)), rtol=0, atol=1e-5)
    assert ours.energies.item() == pytest.approx(found.fun, abs=1e-9)


def test_gradients_by_finite_differences():
    features, log_q = problem(5, 3, 3)
    w = affinity(features, "rbf")
    near = affinity(features, k=2)
    assert torch.autograd.gradcheck(
        lambda q, w: laplacian_assign(q.log_softmax(-1), w, 0.7, max_iterations=3)[:3],
        (log_q.clone().requires_grad_(), w.requires_grad_()),
    )
    assert torch.autograd.gradcheck(
        lambda q, v: laplacian_assign(q.log_softmax(-1), near._replace(weight=v), max_iterations=3).z,
        (log_q.clone().requires_grad_(), near.weight.clone().requires_grad_()),
    )


# --- affinities -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 3, 11, 50])
def test_knn_is_scikit_learns(k):
    features, _ = problem()
    unit = nn.functional.normalize(features, dim=-1).numpy()
    peer = kneighbors_graph(unit, min(k, 11), mode="connectivity", include_self=False).toarray()
    ours = affinity(features, k=k).dense()
    assert torch.equal(ours, torch.from_numpy(peer))
    assert (ours.sum(-1) == min(k, 11)).all()


def test_blocks_of_rows_change_nothing(monkeypatch):
    features, _ = problem(20)
    whole = affinity(features).dense()
    monkeypatch.setattr(graphs, "BLOCK", 7)
    assert torch.equal(affinity(features).dense(), whole)


def test_rbf_is_a_positive_kernel():
    features, _ = problem()
    w = affinity(features, "rbf")
    assert_close(w, w.T, rtol=0, atol=1e-14)
    assert torch.equal(w.diagonal(), torch.ones(12, dtype=torch.double))
    assert torch.linalg.eigvalsh(w).min() > -1e-12


def test_symmetric_is_the_mean_with_the_transpose():
    features, _ = problem()
    for kind in KINDS:
        w = dense(affinity(features, kind, 3))
        assert_close(affinity(features, kind, 3, symmetric=True), (w + w.T) / 2)


def test_linear_affinities_may_repel():
    w = affinity(torch.tensor([[1.0, 0.0], [-1.0, 0.1]]), "linear")
    assert w[0, 1] < -0.9
    z = laplacian_assign(torch.tensor([[0.6, 0.4], [0.55, 0.45]]).log(), w, 4.0).z
    assert z[0, 0] > 0.6 and z[1, 0] < 0.5  # opposite features: pushed to opposite classes


def test_any_affinity_of_the_users():
    features, log_q = problem()
    near = affinity(features)
    expected = laplacian_assign(log_q, near).z
    w = near.dense()
    for other in (w, w.float(), w.to_sparse_coo(), w.to_sparse_csr(), near._replace(weight=near.weight.half())):
        result = laplacian_assign(log_q, other)
        assert_close(result.z, expected)
        assert_close(energy(result.z, log_q, other), energy(expected, log_q, near))
    rows = near._replace(weight=near.weight / near.weight.sum(-1, keepdim=True))  # votes averaged, not summed
    assert_close(laplacian_assign(log_q, rows, 5.0).z, expected)


# --- invariances ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_order_of_samples_and_classes_does_not_matter(kind):
    features, log_q = problem(20)
    z = laplacian_assign(log_q, affinity(features, kind)).z
    g = torch.Generator().manual_seed(1)
    i, c = torch.randperm(20, generator=g), torch.randperm(4, generator=g)
    assert_close(laplacian_assign(log_q[i], affinity(features[i], kind)).z, z[i], rtol=1e-9, atol=1e-12)
    assert_close(laplacian_assign(log_q[:, c], affinity(features, kind)).z, z[:, c], rtol=1e-9, atol=1e-12)


def test_rotating_and_scaling_features_does_not_matter():
    features, log_q = problem()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.double)).Q
    for kind in KINDS:
        z = laplacian_assign(log_q, affinity(features, kind)).z
        assert_close(laplacian_assign(log_q, affinity(3.7 * features @ rotation, kind)).z, z)


def test_blocks_of_the_affinity_are_independent_batches():
    (fa, qa), (fb, qb) = problem(7, seed=1), problem(5, seed=2)
    wa, wb = affinity(fa, "rbf"), affinity(fb, "rbf")
    fixed = {"tolerance": 0.0, "max_iterations": 30}
    both = laplacian_assign(torch.cat([qa, qb]), torch.block_diag(wa, wb), **fixed).z
    apart = [laplacian_assign(qa, wa, **fixed).z, laplacian_assign(qb, wb, **fixed).z]
    assert_close(both, torch.cat(apart), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_streams_at_once_equal_one_by_one(kind, symmetric):
    streams = [problem(9, seed=s) for s in range(6)]
    features, log_q = (torch.stack(t).view(2, 3, 9, -1) for t in zip(*streams, strict=True))
    features[0, 1, 4] = math.nan  # one stream loses a sample, the others do not
    together = laplacian_assign(log_q, affinity(features, kind, 3, symmetric=symmetric))
    assert together.iterations.unique().numel() > 1  # they stop at different times: freezing is exercised
    for s in np.ndindex(2, 3):
        one = laplacian_assign(log_q[s], affinity(features[s], kind, 3, symmetric=symmetric))
        assert one.iterations == together.iterations[s]
        assert_close(together.z[s], one.z, rtol=0, atol=1e-14)
        stopped = int(one.iterations)
        assert_close(together.energies[s][:stopped], one.energies)
        assert (together.energies[s][stopped:] == together.energies[s][stopped - 1]).all()


def test_looking_less_often_changes_nothing(monkeypatch):
    """As on an accelerator: a stream freezes on the device, and the host notices only every fifth iteration."""
    features, log_q = (torch.stack(t) for t in zip(*(problem(9, seed=s) for s in range(6)), strict=True))
    for w, q in ((affinity(features), log_q), (affinity(features[0]), log_q[0])):
        each_time = laplacian_assign(q, w)
        with monkeypatch.context() as patch:
            patch.setattr(lame, "_every", lambda device: 5)
            fifth = laplacian_assign(q, w)
        assert all(torch.equal(a, b) for a, b in zip(each_time, fifth, strict=True))


# --- edge cases -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1])
def test_empty_batch_and_lone_sample(kind, n):
    features, log_q = problem(n) if n else (torch.empty(0, 6), torch.empty(0, 4))
    for symmetric in (False, True):
        result = laplacian_assign(log_q, affinity(features, kind, symmetric=symmetric))
        assert_close(result.z, log_q.exp(), rtol=0, atol=1e-15)


def test_rbf_with_one_neighbour_is_its_own_reference():
    """k = 1 is the distance to oneself, sigma = 0: only coincident pairs are linked, and nothing is NaN."""
    features, _ = problem()
    assert torch.equal(affinity(features, "rbf", 1), torch.eye(12, dtype=torch.double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rbf_of_duplicates(dtype):
    """Every sample twice and k = 2: again sigma = 0, and in float32 rounding must not pass for a distance."""
    features, _ = problem(6, d=512, dtype=dtype)
    w = affinity(features.repeat(2, 1), "rbf", 2)
    assert_close(w, torch.eye(6, dtype=dtype).repeat(2, 2), rtol=0, atol=1e-6)


def test_no_sample_is_its_own_neighbour_among_duplicates():
    w = affinity(torch.ones(6, 3), k=4).dense()
    assert (w.diagonal() == 0).all() and (w.sum(-1) == 4).all()


def test_more_neighbours_than_samples_is_the_complete_graph():
    features, _ = problem(5)
    assert torch.equal(affinity(features, k=99).dense(), 1 - torch.eye(5, dtype=torch.double))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [[3], [0, 7], list(range(1, 12)), list(range(12))])
def test_broken_rows_are_as_if_absent(kind, bad, rows):
    features, log_q = problem()
    whole = [i for i in range(12) if i not in rows]
    without = laplacian_assign(log_q[whole], affinity(features[whole], kind))
    features[rows, 2] = bad
    z = laplacian_assign(log_q, affinity(features, kind)).z
    assert_close(z[whole], without.z, rtol=1e-7, atol=1e-7)  # the stopping sums differ, so the last digits may
    assert_close(z[rows], log_q[rows].exp())  # their own q


@pytest.mark.parametrize("row", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_a_row_that_is_no_distribution_starts_uniform(row):
    log_q = torch.tensor([row, [0.2, 0.8]])
    log_q[1] = log_q[1].log()
    assert_close(laplacian_assign(log_q, torch.zeros(2, 2)).z, torch.tensor([[0.5, 0.5], [0.2, 0.8]]))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_features_stay_finite(kind):
    features, log_q = problem()
    features[[1, 2]] = 0.0
    assert laplacian_assign(log_q, affinity(features, kind)).z.isfinite().all()


def test_impossible_classes_stay_impossible_unless_floored():
    log_q = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.1, 0.9]], dtype=torch.double).log()
    w = 40 * (1 - torch.eye(3))
    result = laplacian_assign(log_q, w)
    assert result.z[0, 1] == 0 and result.z.isfinite().all() and energy(result.z, log_q, w).isfinite()
    floored = laplacian_assign(log_q, w, floor=1e-10)
    z, _ = naive.published_assign(log_q.exp(), w.double())
    assert_close(floored.z, z)
    assert floored.z[0, 1] > 0


def test_log_z_survives_where_z_underflows():
    log_q = torch.tensor([[0.0, -200.0], [0.0, -200.0]])
    result = laplacian_assign(log_q, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert result.z[0, 1] == 0
    assert_close(result.log_z[0, 1].item(), -201.0)


def test_every_setting_of_the_kernels_matters():
    features, log_q = problem(16, 8, 5)
    features = features * torch.linspace(0.2, 3, 16, dtype=torch.double)[:, None]
    base = laplacian_assign(log_q, affinity(features)).z

    def differs(z: Tensor) -> bool:
        return not torch.allclose(z, base, rtol=0, atol=1e-9)

    assert all(
        differs(laplacian_assign(log_q, affinity(features, **change)).z)
        for change in ({"kind": "rbf"}, {"kind": "linear"}, {"k": 3}, {"symmetric": True}, {"normalise": False})
    )
    assert all(
        differs(laplacian_assign(log_q, affinity(features), **change).z)
        for change in ({"strength": 0.3}, {"floor": 0.1}, {"max_iterations": 1}, {"tolerance": 0.1})
    )


def test_stopping_needs_three_iterations():
    features, log_q = problem()
    assert laplacian_assign(log_q, affinity(features), tolerance=1e9).iterations == 3
    assert laplacian_assign(log_q, affinity(features), max_iterations=2).energies.shape == (2,)


def test_two_runs_are_identical_and_inputs_are_untouched():
    features, log_q = problem()
    kept = features.clone(), log_q.clone()
    first, second = (laplacian_assign(log_q, affinity(features, kind)).z for kind in ("rbf", "rbf"))
    assert torch.equal(first, second)
    assert torch.equal(features, kept[0]) and torch.equal(log_q, kept[1])


F32 = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: affinity(F32, "cosine"), ValueError, "kind: expected one of"),
        (lambda: affinity(F32, k=0), ValueError, "k: expected an integer >= 1, got 0"),
        (lambda: affinity(F32, k=2.5), ValueError, "k: expected an integer"),
        (lambda: affinity(F32.long()), TypeError, "features: expected a floating-point tensor, got torch.int64"),
        (lambda: affinity([[0.0]]), TypeError, "features: .* got list"),
        (lambda: affinity(F32[0]), ValueError, r"features: expected shape .* got \(2,\)"),
        (lambda: laplacian_assign(F32, torch.zeros(2, 2)), ValueError, "affinity: expected"),
        (lambda: laplacian_assign(F32, affinity(F32[:2])), ValueError, "affinity: expected"),
        (lambda: laplacian_assign(torch.zeros(3, 0), torch.zeros(3, 3)), ValueError, "log_probs: expected shape"),
        (lambda: laplacian_assign(F32, torch.zeros(3, 3), -1.0), ValueError, "strength: expected .* got -1"),
        (lambda: laplacian_assign(F32, torch.zeros(3, 3), math.nan), ValueError, "strength: expected"),
        (lambda: laplacian_assign(F32, torch.zeros(3, 3), floor=-1e-9), ValueError, "floor: expected"),
        (lambda: laplacian_assign(F32, torch.zeros(3, 3), tolerance=-1), ValueError, "tolerance: expected"),
        (lambda: laplacian_assign(F32, torch.zeros(3, 3), max_iterations=0), ValueError, "max_iterations: expected"),
        (lambda: LAME(nn.Linear(2, 2)), ValueError, "head: expected"),
        (lambda: LAME(nn.Linear(2, 2), head="fc"), ValueError, "head: expected .* got 'fc'"),
        (lambda: LAME("resnet"), TypeError, "model: expected"),
        (lambda: LAME(Net(), kind="cosine"), ValueError, "kind"),
        (lambda: LAME(Net(), k=0), ValueError, "k: expected"),
        (lambda: LAME(Net(), strength=-1), ValueError, "strength"),
        (lambda: LAME(Net(), max_iterations=0), ValueError, "max_iterations"),
    ],
)
def test_bad_arguments_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


# --- the wrapper ------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """A BatchNorm classifier with timm's protocol, and a counter of backbone passes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.fc = nn.Linear(6, 4)
            self.body[1].running_mean.normal_()
        self.passes = 0

    def forward_features(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.body(x)

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        h = h.flatten(1)
        return h if pre_logits else self.fc(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def images(n: int = 12, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> tuple:
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def same(a: tuple, b: tuple) -> bool:
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


def test_forward_is_the_kernels_on_the_models_outputs():
    net, x = Net().eval(), images()
    method = LAME(net, k=3, strength=0.8)
    h = net.forward_features(x).detach()
    w = affinity(h.flatten(1), k=3)
    expected = laplacian_assign(net.forward_head(h).detach().log_softmax(-1), w, 0.8).log_z
    assert torch.equal(method(x), expected)
    assert method.source.passes == 1
    assert_close(method(x).exp().sum(-1), torch.ones(12))
    assert torch.equal(LAME(net, k=3, strength=0.8, head="fc")(x), expected)  # the same features, by the hook


def test_no_strength_is_the_source_model():
    net, x = Net().eval(), images()
    assert_close(LAME(net, strength=0.0)(x), net(x).log_softmax(-1))


def test_source_statistics_whatever_mode_is_asked_for():
    net, x = Net(), images()
    frozen = LAME(net)(x)
    net.train()
    method = LAME(net).train()
    assert torch.equal(method(x), frozen)
    assert not any(m.training for m in method.modules())


def test_no_batch_leaves_a_trace():
    net = Net().train()
    before = state(net)
    method = LAME(net)
    inside, first = state(method), method(images())
    for seed in range(3):
        method(images(seed=seed))
    method(images() * math.nan)
    assert same(state(method), inside) and same(state(net), before)
    assert torch.equal(method(images()), first)
    method.reset()
    assert same(state(method), inside) and torch.equal(method(images()), first)
    assert not method.source.fc._forward_pre_hooks


def test_hook_is_removed_even_when_the_model_fails():
    method = LAME(Net(), head="fc")
    with pytest.raises(RuntimeError):
        method(torch.zeros(2, 5, 8, 8))
    assert not method.source.fc._forward_pre_hooks


def test_a_broken_image_harms_only_itself():
    net, x = Net(), images()
    for kind in KINDS:
        clean = LAME(net, kind)(x[1:])
        x[0] = math.nan
        out = LAME(net, kind)(x)
        assert_close(out[1:], clean, rtol=1e-4, atol=1e-4)  # float32, and the stopping sums differ
        assert_close(out[0].exp(), torch.full((4,), 0.25))


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_batches_through_the_wrapper(n):
    net = Net().eval()
    for kind in KINDS:
        assert_close(LAME(net, kind)(images(n)), net(images(n)).log_softmax(-1))


@pytest.mark.parametrize("x", [torch.zeros(2, 1, 8, 8, dtype=torch.long), [[0.0]], torch.zeros(3)])
def test_bad_inputs_are_refused(x):
    with pytest.raises((TypeError, ValueError), match="x: expected"):
        LAME(Net())(x)


def test_every_setting_of_the_wrapper_matters():
    net, x = Net(), images(16)
    base = LAME(net)(x)
    changes = {"kind": "rbf", "k": 2, "strength": 0.4, "symmetric": True, "max_iterations": 1}
    for name, value in changes.items():
        assert not torch.allclose(LAME(net, **{name: value})(x), base, atol=1e-4), name


def test_half_precision_model():
    net, x = Net().eval(), images()
    out = LAME(copy.deepcopy(net).to(torch.bfloat16))(x.to(torch.bfloat16))
    assert out.dtype == torch.float32 and out.isfinite().all()


def test_gains_when_neighbours_share_labels():
    """A frozen net that errs on a third of a batch of one class: the majority corrects the rest."""
    net, x = Net().eval(), images(30)
    with torch.no_grad():
        usual = net(x).mean(0).argmax()
        wrong = (net(x).argmax(-1) != usual).sum()
    fixed = (LAME(net, k=5, strength=2.0)(x).argmax(-1) != usual).sum()
    assert fixed < wrong or wrong == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
        ("resnet18", {"block": timm.models.resnet.BasicBlock, "layers": (1, 1, 1, 1)}),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_timm_models_untouched(name, options):
    net = timm.create_model(name, pretrained=False, num_classes=10, **options).eval()
    x = images(6, 3, 32)
    before = state(net)
    method = LAME(net, k=2)
    with torch.no_grad():
        h = net.forward_features(x)
        features, logits = net.forward_head(h, pre_logits=True), net(x)
    expected = laplacian_assign(logits.log_softmax(-1), affinity(features, k=2)).log_z
    assert_close(method(x), expected)
    assert same(state(net), before)


def test_torchvision_model_by_the_name_of_its_head():
    net = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    x = images(6, 3, 32)
    headless = copy.deepcopy(net)
    headless.fc = nn.Identity()
    with torch.no_grad():
        expected = laplacian_assign(net(x).log_softmax(-1), affinity(headless(x), k=2)).log_z
    assert_close(LAME(net, k=2, head="fc")(x), expected)


# --- features that are almost the same --------------------------------------------------------------------------------
@pytest.mark.parametrize("films", [1, 2, 4])
@pytest.mark.parametrize("gap", [1e-4, 1e-6, 1e-8])
def test_frames_of_a_film_have_the_neighbours_of_float64(films, gap):
    """Cosines of 1 - gap: in |a|^2 + |b|^2 - 2 a.b nothing of the distance would be left in float32."""
    g = torch.Generator().manual_seed(0)
    films_of = torch.randn(films, 256, generator=g).repeat_interleave(48 // films, 0)
    features = 10 * (films_of + math.sqrt(gap) * torch.randn(48, 256, generator=g))
    unit = nn.functional.normalize(features.double(), dim=-1)
    distance = (unit[:, None] - unit).square().sum(-1).sqrt()
    sigma = distance.topk(5, largest=False).values[:, -1].mean()
    expected = (-(distance**2) / (2 * sigma**2)).exp().float()
    assert_close(affinity(features, "rbf"), expected, rtol=0, atol=1e-6)
    near = distance.fill_diagonal_(math.inf).topk(5, largest=False).indices.sort(-1).values
    assert torch.equal(affinity(features).index.sort(-1).values, near)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_common_offset_of_the_features_is_no_neighbour(normalise):
    """Not normalised, distances do not know it; normalised, they are those on the sphere, offset and all."""
    features, _ = problem(20, 6)
    moved = features + 1e4
    unit = nn.functional.normalize(moved, dim=-1) if normalise else features
    distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    expected = distance.topk(3, largest=False).indices.sort(-1).values
    assert torch.equal(affinity(moved, k=3, normalise=normalise).index.sort(-1).values, expected)
