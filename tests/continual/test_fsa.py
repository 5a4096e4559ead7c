"""FSA: the incremental head against closed forms, numpy, scikit-learn, loops; FiLM; the first session; the object."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.continual.core.film import EFFICIENTNET, FiLM, film_parameters, inject_film, merge_film, remove_film
from peftref.continual.core.lda import LDA, Moments, discriminant, merge, moments
from peftref.continual.core.metrics import evaluate
from peftref.continual.core.streams import class_incremental
from peftref.continual.fsa import FSA, cosine_distance, embed, first_session
from peftref.data import load
from peftref.models import SmallCNN, pretrained
from tests._naive import fsa as naive

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def cloud(n: int = 60, d: int = 5, k: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple:
    """Correlated features around k class means, far from the origin; every class occurs, unequally often."""
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=g) * torch.randint(2, (n - k,), generator=g)])
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    centres = 3 + 2 * torch.randn(k, d, generator=g, dtype=torch.float64)
    x = centres[y] + torch.randn(n, d, generator=g, dtype=torch.float64) @ mix
    return x.to(dtype), y


def balanced(n: int, d: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, _ = cloud(n * k, d, k, seed)
    y = torch.arange(k).repeat(n)
    return x + 2 * torch.randn(k, d, generator=torch.Generator().manual_seed(seed + 9), dtype=x.dtype)[y], y


def sessions(x: Tensor, y: Tensor, sizes: list[int]) -> LDA:
    head = LDA(ridge=0.1)
    for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
        head.partial_fit(xs, ys)
    return head


def state(model: nn.Module) -> tuple:
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def same(a: tuple, b: tuple) -> bool:
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


# --- moments ----------------------------------------------------------------------------------------------------------
def test_total_scatter_is_numpys_covariance():
    x, y = cloud()
    m = moments(x, y, 4)
    assert_close(m.total() / (len(x) - 1), torch.from_numpy(np.cov(x.numpy().T)), **EXACT)
    assert_close(m.total() / (len(x) - 1), torch.cov(x.T), **EXACT)
    raw = x.T @ x - torch.outer(x.sum(0), x.sum(0)) / len(x)  # (A - s s^T / n), harmless in float64 at this scale
    assert_close(m.total(), raw, rtol=1e-9, atol=1e-9)


def test_within_scatter_is_the_sum_of_the_classes_covariances():
    x, y = cloud()
    each = [np.cov(x[y == c].numpy().T) * ((y == c).sum().item() - 1) for c in range(4) if (y == c).sum() > 1]
    assert_close(moments(x, y, 4).within, torch.from_numpy(sum(each)), **EXACT)
    assert_close(moments(x, y, 4).means, torch.stack([x[y == c].mean(0) for c in range(4)]), **EXACT)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 59), st.integers(1, 6), st.integers(1, 5))
def test_merging_is_the_moments_of_the_union(seed, cut, d, k):
    x, y = cloud(60, d, k, seed)
    a, b, whole = moments(x[:cut], y[:cut], k), moments(x[cut:], y[cut:], k), moments(x, y, k)
    for got, want in zip(merge(a, b), whole, strict=True):
        assert_close(got, want, **EXACT)
    for got, want in zip(merge(a, b), merge(b, a), strict=True):  # which side is which does not matter
        assert_close(got, want, **EXACT)
    empty = Moments(*(torch.zeros_like(t) for t in whole))
    assert all(torch.equal(p, q) for p, q in zip(merge(whole, empty), whole, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(merge(empty, whole), whole, strict=True))


def test_centred_moments_survive_means_at_which_raw_ones_lose_all_digits():
    x, y = cloud(200)
    far = x + 1e8
    s = torch.cov(x.T)
    head = LDA().partial_fit(far[:90], y[:90]).partial_fit(far[90:], y[90:])
    ours = head.moments.total() / 199
    raw = (far.T @ far - torch.outer(far.sum(0), far.sum(0)) / 200) / 199
    assert (ours - s).abs().max() < 1e-6 * s.abs().max()
    assert (raw - s).abs().max() > 1e-2 * s.abs().max()  # this is why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_features_are_summed_in_float64(dtype):
    x, y = cloud(500, dtype=dtype)
    head = LDA(ridge=0.1).partial_fit(x, y)
    want = LDA(ridge=0.1).partial_fit(x.double(), y)
    assert head.within.dtype == torch.float64 and torch.equal(head.coef_, want.coef_)
    z = head(x)
    assert z.dtype == torch.float32  # for the same numbers in float64 the logits differ by float32's rounding alone
    assert_close(z, want(x.double()).float(), rtol=1e-6, atol=1e-5)


# --- the head: closed forms and peers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("scatter", ["total", "within"])
@pytest.mark.parametrize(("ridge", "ridge_rel"), [(1.0, 0.0), (0.0, 0.3), (0.2, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("prior", [None, "empirical"])
def test_the_head_is_the_loop(scatter, ridge, ridge_rel, prior):
    x, y = cloud(30, 4, 3)
    coef, bias = discriminant(moments(x, y, 3), scatter, ridge, ridge_rel, prior)
    want = naive.loop_discriminant(x.tolist(), y.tolist(), scatter, ridge, ridge_rel, prior)
    assert_close(coef, torch.tensor(want[0], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert_close(bias, torch.tensor(want[1], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_within_is_scikit_learns_discriminant():
    """Ours divides W by n - K, theirs by n: on balanced classes one factor aligns all weights."""
    x, y = balanced(30, 6, 5)
    peer = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(5, 0.2)).fit(x.numpy(), y.numpy())
    head = LDA("within", ridge=0.0).partial_fit(x, y)
    align = (len(x) - 5) / len(x)
    assert_close(head.coef_, torch.from_numpy(peer.coef_) * align, rtol=1e-8, atol=1e-8)
    assert_close(head.intercept_, torch.from_numpy(peer.intercept_ - math.log(0.2)) * align, rtol=1e-8, atol=1e-8)
    assert torch.equal(head.predict(x), torch.from_numpy(peer.predict(x.numpy())))


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_relative_ridge_is_scikit_learns_shrinkage(share):
    """(1 - s) S + s tr(S)/d I is, up to 1 - s, our S + rho tr(S)/d I with rho = s / (1 - s); unbalanced, with prior."""
    x, y = cloud(80, 6, 4)
    n, k = len(x), 4
    peer = LinearDiscriminantAnalysis(solver="eigen").fit(x.numpy(), y.numpy())  # no shrinkage: S = W / n
    head = LDA("within", ridge=0.0).partial_fit(x, y)
    assert_close(
        torch.from_numpy(peer.covariance_) * n / (n - k), head.within / (n - k), rtol=1e-8, atol=1e-8
    )  # unbalanced classes too, as their average is weighted by the classes' shares
    x, y = balanced(20, 6, 4)
    n = len(x)
    peer = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(4, 0.25))
    peer.fit(x.numpy(), y.numpy())
    s = torch.from_numpy(peer.covariance_)
    shrunk = (1 - share) * s + share * s.trace() / 6 * torch.eye(6, dtype=s.dtype)
    want = torch.linalg.solve(shrunk, torch.from_numpy(peer.means_).T).T
    coef, _ = discriminant(moments(x, y, 4), "within", 0.0, share / (1 - share))
    assert_close(coef, want * (1 - share) * (n - 4) / n, rtol=1e-8, atol=1e-8)


def test_empirical_prior_is_scikit_learns():
    x, y = cloud(80, 6, 4)
    peer = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), y.numpy())
    m, align = moments(x, y, 4), (80 - 4) / 80
    (_, plain), (_, bias) = (discriminant(m, "within", 0.0, prior=p) for p in (None, "empirical"))
    want = torch.from_numpy(peer.intercept_)
    assert_close(plain / align + (bias - plain), want, rtol=1e-8, atol=1e-8)


def test_two_classes_have_one_direction_whichever_scatter():
    x, y = cloud(50, 6, 2)
    m = moments(x, y, 2)
    total, within = (discriminant(m, s, 0.0)[0].diff(dim=0)[0] for s in ("total", "within"))
    assert_close(F.normalize(total, dim=0), F.normalize(within, dim=0), rtol=1e-9, atol=1e-9)
    three = moments(*cloud(50, 6, 3), 3)
    total, within = (discriminant(three, s, 0.0)[0] for s in ("total", "within"))
    # The same subspace for more classes, but not the same directions in it.
    t, w = (F.normalize((c - c[:1])[1:], dim=1) for c in (total, within))
    assert torch.linalg.matrix_rank(torch.cat([t, w]), rtol=1e-9) == 2
    assert not torch.allclose(t, w, atol=1e-3)


def test_without_scatter_or_with_endless_ridge_it_is_the_nearest_class_mean():
    x, y = cloud(60, 5, 4)
    m = moments(x, y, 4)
    coef, bias = discriminant(m._replace(within=torch.zeros_like(m.within)), "within", 1.0)
    assert_close(coef, m.means, **EXACT)
    assert_close(bias, -m.means.square().sum(1) / 2, **EXACT)
    peer = NearestCentroid().fit(x.numpy(), y.numpy())
    nearest = torch.from_numpy(peer.predict(x.numpy()))
    assert torch.equal((x @ coef.T + bias).argmax(1), nearest)
    for scatter in ("total", "within"):
        coef, bias = discriminant(m, scatter, 1e12)
        assert_close(coef * 1e12, m.means, rtol=1e-8, atol=1e-8)
        assert torch.equal((x @ coef.T + bias).argmax(1), nearest)


def test_one_sample_and_one_per_class():
    x, y = cloud(4, 5, 4)
    one = LDA().partial_fit(x[:1], y[:1])
    assert_close(one.coef_, x[:1], **EXACT)  # covariance 0, ridge 1: its own mean
    head = LDA().partial_fit(x, y)  # total scatter: the covariance of four samples
    want = torch.linalg.solve(torch.cov(x.T) + torch.eye(5, dtype=x.dtype), x.T).T
    assert_close(head.coef_, want, **EXACT)
    assert_close(LDA("within").partial_fit(x, y).coef_, x, **EXACT)  # within: no scatter left
    assert torch.equal(head.predict(x), y)


@pytest.mark.parametrize("scatter", ["total", "within"])
def test_affine_maps_of_the_features_change_no_decision(scatter):
    x, y = cloud(80, 5, 4)
    g = torch.Generator().manual_seed(1)
    R = torch.randn(5, 5, generator=g, dtype=x.dtype)
    R = R + 3 * torch.eye(5, dtype=x.dtype)
    moved = x @ R.T + 7
    plain, affine = (LDA(scatter, ridge=0.0).partial_fit(t, y) for t in (x, moved))
    a, b = plain(x), affine(moved)
    assert_close(a - a[:, :1], b - b[:, :1], rtol=1e-7, atol=1e-7)  # only differences between classes are invariant
    assert not torch.allclose(a, b, atol=1e-2)
    assert torch.equal(plain.predict(x), affine.predict(moved))
    turned = torch.linalg.qr(R).Q
    a, b = (LDA(scatter, ridge=0.5).partial_fit(t, y)(t) for t in (x, x @ turned.T))
    assert_close(a, b, rtol=1e-8, atol=1e-8)  # a ridge is blind to rotations


def test_only_the_relative_ridge_is_blind_to_the_scale():
    x, y = cloud(80, 5, 4)
    relative = [LDA(ridge=0.0, ridge_rel=0.3).partial_fit(c * x, y)(c * x) for c in (1.0, 0.01)]
    absolute = [LDA(ridge=1.0).partial_fit(c * x, y)(c * x) for c in (1.0, 0.01)]
    assert_close(*relative, rtol=1e-9, atol=1e-9)
    assert (absolute[0].argmax(1) != absolute[1].argmax(1)).any()


# --- the head: incremental --------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 59), max_size=6), st.sampled_from(["stored", "sorted", "mixed"]))
def test_any_order_in_any_sessions_is_the_joint_fit(seed, cuts, order):
    x, y = cloud(60, 5, 4, seed)
    y = torch.tensor([40, -7, 3, 1000])[y]
    joint = LDA(ridge=0.1).partial_fit(x, y)
    g = torch.Generator().manual_seed(seed)
    rows = {"stored": torch.arange(60), "sorted": y.argsort(), "mixed": torch.randperm(60, generator=g)}[order]
    edges = [0, *sorted(cuts), 60]
    head = sessions(x[rows], y[rows], [b - a for a, b in zip(edges, edges[1:], strict=False)])
    assert torch.equal(head.classes_, joint.classes_) and head.classes_.tolist() == [-7, 3, 40, 1000]
    assert_close(head.coef_, joint.coef_, **EXACT)
    assert_close(head.intercept_, joint.intercept_, **EXACT)


def test_memory_does_not_grow_with_the_samples():
    head = LDA()
    sizes = []
    for seed in range(3):
        x, y = cloud(500, 5, 4, seed)
        head.partial_fit(x, y)
        sizes.append(sum(t.numel() for t in head.state_dict().values()))
    assert sizes == [5 * 5 + 4 * 5 + 4 + 4 + 4] * 3  # the last are the settings


def test_weights_are_computed_once_and_anew_after_learning(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "peftref.continual.core.lda.discriminant", lambda *args, **kw: calls.append(1) or discriminant(*args, **kw)
    )
    x, y = cloud()
    head = LDA()
    for part in (slice(0, 30), slice(30, 60)):
        head.partial_fit(x[part], y[part])
    assert not calls
    head(x), head.predict(x), head.coef_
    assert len(calls) == 1
    before = head.coef_.clone()
    head.partial_fit(x[:5], y[:5])  # the same samples again count twice, as they must
    assert not torch.allclose(head.coef_, before) and len(calls) == 2


def test_unseen_classes_never_win_where_the_published_code_lets_them():
    """All logits of the seen classes are negative for this sample; a column of zeros beats them."""
    x, y = cloud(60, 5, 3)
    x = x - x.mean(0) + 0.2
    weight, bias = naive.published_head(x, y, 5)
    z = naive.published_logits(x, weight, bias)
    head = LDA().partial_fit(x, y)
    assert_close(head(x), z[:, :3], **EXACT)  # where both have a class they agree: the bias is halved once
    lost = z[:, :3].amax(1) < 0
    assert lost.any() and (z.argmax(1)[lost] >= 3).all()
    assert head.predict(x).max() < 3
    padded = Moments(*(F.pad(t, (0,) * (2 * t.ndim - 1) + (2,)) for t in head.moments[:2]), head.within)
    coef, intercept = discriminant(padded)  # a class that is asked for and has no samples
    assert intercept[3:].tolist() == [-math.inf] * 2 and (x @ coef.T + intercept).argmax(1).max() < 3
    assert_close(intercept[:3], head.intercept_, **EXACT)


def test_every_setting_changes_the_logits():
    x, y = cloud()
    base = LDA().partial_fit(x, y)(x)
    for change in ({"scatter": "within"}, {"ridge": 0.5}, {"ridge_rel": 0.1}, {"prior": "empirical"}):
        assert not torch.allclose(LDA(**change).partial_fit(x, y)(x), base, atol=1e-3), change


def test_state_goes_through_a_file_into_an_empty_head_and_learning_goes_on(tmp_path):
    x, y = cloud(60, 5, 4)
    head = LDA(ridge=0.1).partial_fit(x[:40], y[:40])
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    other = LDA(ridge=0.1)
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(other(x), head(x))
    snapshot = {k: v.clone() for k, v in head.state_dict().items()}
    other.partial_fit(x[40:], y[40:])
    assert all(torch.equal(v, snapshot[k]) for k, v in head.state_dict().items())
    assert_close(other.coef_, LDA(ridge=0.1).partial_fit(x, y).coef_, **EXACT)
    bad = head.state_dict() | {"means": torch.zeros(2, 3)}
    with pytest.raises(RuntimeError, match=r"expected shapes \(K,\), \(K,\), \(K, d\), \(d, d\)"):
        other.load_state_dict(bad)
    assert_close(other.coef_, LDA(ridge=0.1).partial_fit(x, y).coef_, **EXACT)


def test_half_moves_no_statistic_out_of_float64():
    x, y = cloud()
    head = LDA().partial_fit(x, y)
    want = head(x)
    assert head.half().within.dtype == torch.float64 and torch.equal(head(x), want)
    assert head.to(torch.bfloat16).classes_.dtype == torch.long


def test_logits_are_differentiable_in_the_features_even_after_inference_mode():
    x, y = cloud(20, 3, 2)
    head = LDA()
    with torch.inference_mode():
        head.partial_fit(x.clone(), y)
        head(x)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(head, x)
    (grad,) = torch.autograd.grad(head(x)[:, 1].sum(), x)
    assert_close(grad, head.coef_[1].expand_as(x), **EXACT)
    head.partial_fit(x.detach(), y)


def test_a_refused_call_changes_nothing():
    x, y = cloud()
    head = LDA().partial_fit(x, y)
    before, coef = state(head), head.coef_
    broken = x.clone()
    broken[3, 1], broken[5, 0] = math.nan, math.inf
    for args, error, says in [
        ((broken, y), ValueError, "features: expected finite numbers, got 2 rows of 60"),
        ((x[:, :4], y), ValueError, r"features: expected shape \(N, 5\), got \(60, 4\)"),
        ((x, y[:-1]), ValueError, r"labels: expected shape \(60,\)"),
        ((x, y.double()), TypeError, "labels: expected integers, got torch.float64"),
        ((x, y > 1), TypeError, "labels: expected integers, got torch.bool"),
        ((x.long(), y), TypeError, "features: expected a floating-point tensor .*got torch.int64"),
        ((x.tolist(), y), TypeError, "features: .* got list"),
    ]:
        with pytest.raises(error, match=says):
            head.partial_fit(*args)
        assert same(state(head), before) and head.coef_ is coef
    fresh = LDA()
    with pytest.raises(ValueError, match="finite"):
        fresh.partial_fit(broken, y)
    assert not len(fresh.classes_)


def test_empty_batches_and_lists_of_labels():
    x, y = cloud()
    head = LDA().partial_fit(x[:0], y[:0])
    with pytest.raises(RuntimeError, match="partial_fit"):
        head(x)
    assert torch.equal(head.partial_fit(x, y.tolist()).coef_, LDA().partial_fit(x, y).coef_)
    before = head.coef_.clone()
    assert torch.equal(head.partial_fit(x[:0], y[:0]).coef_, before)
    assert head(x[:0]).shape == (0, 4)
    narrow = torch.tensor([250, 3], dtype=torch.uint8)
    assert LDA().partial_fit(x[:2], narrow).classes_.tolist() == [3, 250]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LDA("between"), "scatter: expected one of .* got 'between'"),
        (lambda: LDA(ridge=-1.0), "ridge: expected a finite number >= 0"),
        (lambda: LDA(ridge_rel=math.nan), "ridge_rel: expected a finite number >= 0"),
        (lambda: LDA(prior="uniform"), "prior: expected one of"),
        (lambda: discriminant(moments(torch.zeros(0, 2), torch.zeros(0).long(), 2)), "moments: expected .* got none"),
        (lambda: merge(moments(*cloud(), 4), moments(*cloud(), 5)), r"b: expected means of shape \(4, 5\)"),
        (lambda: LDA(ridge=0.0).partial_fit(*cloud(6, 9, 2)).coef_, "ridge: expected more than 0, .* 6 samples"),
        (lambda: LDA("within", ridge=0.0).partial_fit(*cloud(9, 8, 3)).coef_, "singular"),
    ],
)
def test_bad_settings_and_singular_covariances_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --- FiLM -------------------------------------------------------------------------------------------------------------
def random_net(seed: int = 0) -> SmallCNN:
    """A small network whose BatchNorm layers are far from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SmallCNN(width=4)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), m.weight.data.normal_(), m.bias.data.normal_()
    return net.eval()


def shake(model: nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in film_parameters(model):
        p.data += 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)


def images(n: int = 6, size: int = 14, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def test_film_is_scale_and_shift_of_the_channels_after_the_norm():
    norm = random_net().stages[1][1].double()
    film, x = FiLM(norm), images(3).double().expand(3, 4, 14, 14)
    shake(film)
    want = film.gamma.view(-1, 1, 1) * norm(x) + film.beta.view(-1, 1, 1)
    assert_close(film(x), want, **EXACT)
    last = nn.LayerNorm(7).double()
    nn.init.normal_(last.weight), nn.init.normal_(last.bias)
    film, x = FiLM(last), torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    shake(film)
    assert_close(film(x), film.gamma * last(x) + film.beta, **EXACT)  # channels last


def test_film_starts_as_the_identity_merges_exactly_and_comes_out_again():
    net, x = random_net(), images()
    before, modules, z = state(net), list(net.modules()), net(x)
    assert inject_film(net) == [f"stages.{i}.1" for i in range(5)]
    assert torch.equal(net(x), z)
    assert sum(p.numel() for p in film_parameters(net)) == 2 * (4 + 4 + 8 + 8 + 16)
    shake(net)
    moved, out = net(x), copy.deepcopy(net)
    assert not torch.allclose(moved, z, atol=1e-2)
    assert torch.equal(out(x), moved)  # a copy has a FiLM of its own ...
    remove_film(out)
    assert torch.equal(net(x), moved) and same(state(out), before) and torch.equal(out(x), z)  # ... with its own end
    merge_film(net)
    assert torch.equal(net(x), moved)
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[0][k])}
    assert changed == {f"stages.{i}.1.{n}" for i in range(5) for n in ("weight", "bias")}


def test_gradients_are_those_of_the_merged_layer():
    """d/dgamma = sum over w of dL/dw' w + dL/db' b, d/dbeta = dL/db', from the folded layer's own gradients."""
    net, x = random_net().double(), images().double()
    inject_film(net)
    shake(net)
    net(x).square().sum().backward()
    films = [m for m in net.modules() if isinstance(m, FiLM)]
    folded = copy.deepcopy(net)
    merge_film(folded)
    folded.zero_grad()
    folded(x).square().sum().backward()
    for film, norm in zip(films, (m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)), strict=True):
        assert_close(film.gamma.grad, norm.weight.grad * film.norm.weight + norm.bias.grad * film.norm.bias, **EXACT)
        assert_close(film.beta.grad, norm.bias.grad, **EXACT)


def test_a_layer_used_twice_has_one_film():
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(norm, nn.Linear(3, 3), norm).eval()
    inject_film(net)
    assert net[0] is net[2] and len(film_parameters(net)) == 2
    merge_film(net)
    assert net[0] is net[2] is norm


def test_efficientnet_b0_has_20544_numbers_before_the_activations():
    net = timm.create_model("efficientnet_b0", pretrained=False).eval()
    g, x = torch.Generator().manual_seed(0), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5, generator=g), m.bias.data.normal_(std=0.2, generator=g)
    z, keys = net(x), list(net.state_dict())
    names = inject_film(net, EFFICIENTNET)
    assert len(names) == 18 and names[0] == "bn1" and names[-1] == "bn2"
    widths = [len(net.get_submodule(n).gamma) for n in names]
    assert (widths[0], sum(widths[1:-1]), widths[-1]) == (32, 8960, 1280)
    assert sum(p.numel() for p in film_parameters(net)) == 20_544 == 2 * (32 + 8960 + 1280)
    depthwise = {n.rsplit(".", 1)[0] for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert {n.rsplit(".", 1)[0] for n in names[1:-1]} == depthwise
    assert torch.equal(net(x), z)
    film = net.bn1
    h = torch.randn(2, 32, 4, 4, generator=g)
    shake(net)
    plain = nn.functional.batch_norm(h, film.norm.running_mean, film.norm.running_var, film.norm.weight, film.norm.bias,
                                     eps=film.norm.eps)  # fmt: skip
    want = F.silu(film.gamma.view(-1, 1, 1) * plain + film.beta.view(-1, 1, 1))
    assert_close(film(h), want, rtol=1e-5, atol=1e-5)
    moved = net(x)
    merge_film(net)
    assert torch.equal(net(x), moved) and list(net.state_dict()) == keys


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: inject_film(nn.Linear(2, 2)), ValueError, "layers: expected names of normalisation layers"),
        (lambda: inject_film(random_net(), "no_such"), ValueError, "layers: .* got no_such"),
        (lambda: inject_film(random_net(), ["stages.0.0"]), ValueError, "layers: "),
        (lambda: inject_film(nn.Sequential(nn.BatchNorm1d(2, affine=False)), "0"), ValueError, "layers: "),
        (lambda: FiLM(nn.Linear(2, 2)), TypeError, "norm: expected a BatchNorm"),
        (lambda: FiLM(nn.BatchNorm1d(2, affine=False)), ValueError, "norm: expected a layer with weight"),
        (lambda: (inject_film(net := random_net()), inject_film(net)), ValueError, "model: expected one without FiLM"),
    ],
)
def test_film_refuses_what_it_cannot_do(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_choice_of_layers():
    net = random_net()
    assert inject_film(net, ["stages.1.1", "stages.3.1"]) == ["stages.1.1", "stages.3.1"]
    assert isinstance(net.stages[1][1], FiLM) and not isinstance(net.stages[0][1], FiLM)


# --- the score --------------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 5))
def test_the_score_is_the_mean_over_all_pairs(seed, n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0] *= seed % 2  # sometimes a zero vector
    assert cosine_distance(x).item() == pytest.approx(naive.loop_cosine_distance(x.tolist()), abs=1e-12)
    assert cosine_distance(3 * x).item() == pytest.approx(cosine_distance(x).item(), abs=1e-12)


def test_the_score_at_its_ends():
    one = torch.ones(5, 3)
    assert cosine_distance(one).item() == pytest.approx(0, abs=1e-12)
    assert cosine_distance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(2)
    assert cosine_distance(torch.eye(4)).item() == pytest.approx(1)
    assert cosine_distance(one.bfloat16()).dtype == torch.float64
    with pytest.raises(ValueError, match="features: expected two rows"):
        cosine_distance(one[:1])


# --- the first session ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tasks():
    return class_incremental(load("fashion8k"), [4, 2, 2, 2], per_class=20)


QUICK = {"epochs": 4, "batch_size": 20}


@pytest.mark.parametrize("body", ["full", "film", "none"])
def test_the_source_is_untouched_and_the_body_frozen_in_eval_mode(tasks, body):
    net = pretrained("mnist5k").train()
    before, rng = state(net), torch.get_rng_state()
    adapted = first_session(net, *tasks[0].train, body, **QUICK)
    assert same(state(net), before) and torch.equal(torch.get_rng_state(), rng)
    assert not any(m.training for m in adapted.modules())
    assert not any(p.requires_grad or p.grad is not None for p in adapted.parameters())
    assert adapted.state_dict().keys() == net.state_dict().keys()  # FiLM has been folded in
    changed = {k for k, v in adapted.state_dict().items() if not torch.equal(v, before[0][k])}
    norms = {f"stages.{i}.1." for i in range(5)}
    if body == "none":
        assert not changed
    elif body == "film":  # source statistics, source convolutions
        assert changed == {n + p for n in norms for p in ("weight", "bias")}
    else:
        statistics = {n + p for n in norms for p in ("running_mean", "running_var", "num_batches_tracked")}
        assert changed == set(before[0]) - {"fc.weight", "fc.bias"} and statistics < changed


def test_full_and_film_are_plain_adam_with_dropout_and_steps(tasks):
    """The same training, written out: one head, one optimiser, one schedule."""
    x, y = tasks[0].train
    adapted = first_session(pretrained("mnist5k"), x, y, "full", epochs=4, batch_size=30, lr=2e-3, decay=0.1, seed=5)
    net = pretrained("mnist5k").train()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        head, g, lr = nn.Linear(64, 4), torch.Generator().manual_seed(5), 2e-3
        optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr)
        for epoch in range(4):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.1 ** (epoch >= 1) * 0.1 ** (epoch >= 2) * 0.1 ** (epoch >= 3)
            for i in torch.randperm(80, generator=g)[:60].split(30):
                optimizer.zero_grad()
                F.cross_entropy(head(F.dropout(embed(net, x[i]), 0.5)), y[i]).backward()
                optimizer.step()
    for got, want in zip(adapted.state_dict().values(), net.state_dict().values(), strict=True):
        assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_full_body_can_keep_the_statistics_of_the_source(tasks):
    net = pretrained("mnist5k")
    adapted = first_session(net, *tasks[0].train, "full", statistics="source", **QUICK).state_dict()
    kept = {name for name, value in net.state_dict().items() if torch.equal(adapted[name], value)}
    norms = {f"stages.{i}.1." for i in range(5)}
    statistics = {n + p for n in norms for p in ("running_mean", "running_var", "num_batches_tracked")}
    assert kept == statistics | {"fc.weight", "fc.bias"}


def test_training_lowers_the_loss_and_reports_it(tasks):
    for body, lr in (("full", 2e-3), ("film", 2e-2)):
        losses = {}
        options = {"epochs": 15, "batch_size": 20, "lr": lr, "after": losses.__setitem__}
        first_session(pretrained("mnist5k"), *tasks[0].train, body, **options)
        assert list(losses) == list(range(15)) and losses[14] < 0.7 * losses[0]


def test_every_setting_of_the_first_session_matters(tasks):
    base = {"epochs": 4, "batch_size": 20}
    x, y = tasks[0].train

    def run(body="full", **changes):
        return embed(first_session(pretrained("mnist5k"), x, y, body, **(base | changes)), x[:10])

    plain = run()
    for change in ({"lr": 1e-3}, {"epochs": 2}, {"milestones": ()}, {"decay": 0.1}, {"batch_size": 40}, {"seed": 1},
                   {"dropout": 0.0}, {"statistics": "source"}, {"body": "film"}, {"body": "none"}):  # fmt: skip
        assert not torch.allclose(run(**change), plain, atol=1e-4), change
    assert not torch.allclose(run("film"), run("film", layers=["stages.0.1"]), atol=1e-4)
    assert torch.equal(run(), plain)  # and the same settings give the same body


def test_labels_need_not_be_contiguous(tasks):
    x, y = tasks[0].train
    a, b = (first_session(pretrained("mnist5k"), x, labels, **QUICK) for labels in (y, 10 * y - 7))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_first_session_of_one_class_adapts_nothing(tasks):
    x, y = tasks[0].train
    net = pretrained("mnist5k")
    adapted = first_session(net, x[y == 0], y[y == 0], **QUICK)
    assert all(torch.equal(p, q) for p, q in zip(adapted.parameters(), net.parameters(), strict=True))


def test_a_failing_first_session_leaves_everything_as_it_was(tasks):
    x, y = tasks[0].train
    fsa = FSA(pretrained("mnist5k"), "full", lr=1e30, **QUICK)
    before, body = state(fsa), fsa.body
    with pytest.raises(FloatingPointError, match="loss: expected a finite number"):
        fsa.adapt(x, y)
    assert fsa.body is body and same(state(fsa), before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"body": "head"}, "body: expected one of"),
        ({"lr": 0.0}, "lr: expected a finite number > 0"),
        ({"epochs": -1}, "epochs: expected an integer"),
        ({"decay": 0.0}, "decay: expected"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"statistics": "none"}, "statistics: expected one of"),
    ],
)
def test_bad_settings_of_the_first_session(tasks, change, says):
    with pytest.raises(ValueError, match=says):
        first_session(SmallCNN(width=4), *tasks[0].train, **change)
    with pytest.raises(ValueError, match="x, y: expected equal"):
        first_session(SmallCNN(width=4), tasks[0].train.x, tasks[0].train.y[1:])


# --- the object -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("body", ["full", "film", "none"])
def test_sessions_one_after_the_other_are_the_joint_fit(tasks, body):
    fsa = FSA(pretrained("mnist5k").double(), body, ridge=0.1, **QUICK)
    fsa.adapt(tasks[0].train.x.double(), tasks[0].train.y)
    joint = copy.deepcopy(fsa)
    for task in tasks:
        fsa.observe(task.train.x.double(), task.train.y)
    x, y = (torch.cat(t) for t in zip(*(task.train for task in reversed(tasks)), strict=True))
    joint.observe(x.double(), y)
    assert_close(fsa.head.coef_, joint.head.coef_, rtol=1e-9, atol=1e-9)  # ridge 0.1: condition up to 1e3
    assert_close(fsa.head.intercept_, joint.head.intercept_, rtol=1e-9, atol=1e-9)


def test_forward_and_predict_agree_and_leave_out_what_was_not_seen(tasks):
    fsa = FSA(pretrained("mnist5k"), "none", num_classes=10, ridge=0.1, chunk=7)
    fsa.adapt(*tasks[0].train)
    for t, task in enumerate(tasks[:3]):
        fsa.observe(*task.train)
        z = fsa(task.test.x[:50])
        seen = 4 + 2 * t
        assert z.shape == (50, 10) and z[:, :seen].isfinite().all() and (z[:, seen:] == -math.inf).all()
        assert torch.equal(z.argmax(1), fsa.predict(task.test.x[:50]))
    row = evaluate(fsa, tasks)
    assert row[0] > 60 and row[3] == 0  # the classes of the last session have not come yet
    whole = FSA(pretrained("mnist5k"), "none", ridge=0.1).observe(*tasks[0].train)
    z = embed(pretrained("mnist5k"), tasks[0].test.x[:50]).detach()
    want = LDA(ridge=0.1).partial_fit(embed(pretrained("mnist5k"), tasks[0].train.x).detach(), tasks[0].train.y)(z)
    assert_close(whole(tasks[0].test.x[:50]), want, rtol=1e-4, atol=1e-4)  # chunks of 500: float32 convolutions


def test_statistics_of_the_body_stand_still_whatever_mode_is_asked_for(tasks):
    """The published code leaves the full body in train mode: its features then depend on the batch, and drift."""
    fsa = FSA(pretrained("mnist5k"), "full", **QUICK).adapt(*tasks[0].train)
    before = state(fsa.body)
    fsa.train()
    assert not any(m.training for m in fsa.modules())
    for task in tasks:
        fsa.observe(*task.train)
        fsa(task.test.x[:20])
    assert same(state(fsa.body), before)
    alone, together = fsa.features(tasks[0].test.x[:1]), fsa.features(tasks[0].test.x[:50])[:1]
    assert_close(alone, together, rtol=1e-4, atol=1e-5)
    published = copy.deepcopy(fsa.body).train()
    with torch.no_grad():
        a, b = (embed(published, tasks[0].test.x[:n])[0] for n in (5, 50))
    assert (a - b).abs().max() > 0.05 and not same(state(published.eval()), before)


def test_adapting_after_observing_is_refused(tasks):
    fsa = FSA(pretrained("mnist5k"), **QUICK).observe(*tasks[0].train)
    before = state(fsa)
    with pytest.raises(RuntimeError, match="adapt: expected nothing observed yet"):
        fsa.adapt(*tasks[0].train)
    assert same(state(fsa), before)


def test_a_broken_image_is_refused_and_nothing_is_learned_of_its_batch(tasks):
    fsa = FSA(pretrained("mnist5k"), "none").observe(*tasks[0].train)
    before = state(fsa)
    x = tasks[1].train.x.clone()
    x[0, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="features: expected finite numbers, got 1 rows"):
        fsa.observe(x, tasks[1].train.y)
    assert same(state(fsa), before)


def test_state_dict_carries_body_and_head(tasks):
    fsa = FSA(pretrained("mnist5k"), "film", **QUICK).adapt(*tasks[0].train).observe(*tasks[0].train)
    other = FSA(SmallCNN())
    other.load_state_dict(fsa.state_dict())
    assert torch.equal(other(tasks[0].test.x[:20]), fsa(tasks[0].test.x[:20]))


def test_labels_outside_the_logits(tasks):
    x, y = tasks[0].train
    fsa = FSA(pretrained("mnist5k"), "none").observe(x, 5 - 3 * y)
    assert set(fsa.predict(x).tolist()) <= {5, 2, -1, -4}
    with pytest.raises(ValueError, match=r"labels: expected them in \[0, 6\) for logits"):
        fsa(x)
    with pytest.raises(TypeError, match="model: expected"):
        FSA("resnet")
    with pytest.raises(ValueError, match="body: expected"):
        FSA(SmallCNN(width=4), "half")


def test_models_with_and_without_timms_protocol():
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net = timm.create_model("resnet18", pretrained=False, num_classes=7).eval()
    assert embed(net, x).shape == (3, 512)
    bare = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(2))
    assert embed(bare, x).shape == (3, 8)
    assert FSA(bare, "none").observe(x, torch.arange(3)).predict(x).tolist() == [0, 1, 2]


def test_half_precision_body(tasks):
    net = pretrained("mnist5k").bfloat16()
    fsa = FSA(net, "film", **QUICK).adapt(tasks[0].train.x.bfloat16(), tasks[0].train.y)
    fsa.observe(tasks[0].train.x.bfloat16(), tasks[0].train.y)
    z = fsa(tasks[0].test.x[:20].bfloat16())
    assert z.dtype == torch.float32 and z.isfinite().all() and fsa.head.within.dtype == torch.float64


# --- settings in the state, FiLM where a layer is not called, wrappers ------------------------------------------------
@pytest.mark.parametrize("scatter", ["total", "within"])
@pytest.mark.parametrize("prior", [None, "empirical"])
def test_a_head_goes_on_with_the_settings_of_its_state(scatter, prior):
    x, y = cloud(60, 5, 4, 0)
    head = LDA(scatter, ridge=0.3, ridge_rel=0.01, prior=prior).partial_fit(x[:40], y[:40])
    stored = io.BytesIO()
    torch.save(head.state_dict(), stored)
    stored.seek(0)
    other = LDA()
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert other.settings == head.settings and torch.equal(other(x), head(x))
    assert torch.equal(other.partial_fit(x[40:], y[40:])(x), head.partial_fit(x[40:], y[40:])(x))
    old = {name: t for name, t in head.state_dict().items() if name != "_extra_state"}  # of before settings were kept
    other = LDA("total", ridge=2.0)
    other.load_state_dict(old)
    assert other.settings["ridge"] == 2.0 and torch.equal(other.within, head.within)
    bodies = [FSA(nn.Linear(5, 5), "none", scatter=scatter, ridge=r, prior=prior) for r in (0.3, 1.0)]
    bodies[0].observe(x.float(), y)
    bodies[1].load_state_dict(bodies[0].state_dict())
    assert torch.equal(bodies[1](x.float()), bodies[0](x.float()))


def test_film_where_the_layers_weight_is_used_without_a_call():
    """The fast path of torch's encoder layers, taken in eval mode without gradients, calls no layer of its own."""
    torch.manual_seed(0)
    block, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    assert inject_film(block) == ["norm1", "norm2"]
    with torch.no_grad():
        for p in film_parameters(block):
            p.add_(0.3 * torch.randn_like(p))
    slow = block(x)
    assert slow.requires_grad
    with torch.no_grad():
        assert_close(block(x), slow)
    merge_film(block)
    assert_close(block(x), slow)

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(8)

        def forward(self, x):
            return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

    net = ByHand().eval()
    inject_film(net)
    net(x[0]).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in film_parameters(net)[1:])
    with torch.no_grad():
        for p in film_parameters(net):
            p.add_(0.5)
    want = net(x[0])
    assert_close(net.bn(x[0]), want)
    merge_film(net)
    assert_close(net(x[0]), want)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_film_and_features_of_wrapped_models(wrap):
    net = timm.create_model("resnet18", pretrained=False, num_classes=7).eval()
    x = torch.rand(2, 3, 32, 32)
    want = embed(net, x)
    assert want.shape == (2, 512) and torch.equal(embed(wrap(net), x), want)
    assert inject_film(wrap(net), r"layer1\.\d\.bn1") == ["layer1.0.bn1", "layer1.1.bn1"]
    assert torch.equal(embed(net, x), want)


class SideBranch(nn.Module):
    """With a normalisation layer that is there and never used, as in an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.a(x))


def test_film_that_no_feature_passes_through_is_refused_where_it_was_asked_for():
    net, x, y = SideBranch(), torch.randn(12, 6), torch.arange(12) % 3
    before = copy.deepcopy(net.state_dict())
    for layers, idle in ((["a", "b"], "b"), ("b", "b")):
        with pytest.raises(ValueError, match=rf"layers: expected .* the features pass through, got \['{idle}'\]"):
            first_session(net, x, y, "film", epochs=1, layers=layers)
    for layers in (None, ["a"]):
        adapted = first_session(net, x, y, "film", epochs=2, layers=layers)
        assert not torch.equal(adapted.a.weight, net.a.weight) and torch.equal(adapted.b.weight, net.b.weight)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
