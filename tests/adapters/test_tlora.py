"""TLoRA alone: rings against traces, the limiting cases, the paper's propositions and the trap in the first of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import tests._naive.tlora as naive
from peftref.adapters.core.files import load, save
from peftref.adapters.core.injection import activate, adapters, inject, merge
from peftref.adapters.core.layers import view
from peftref.adapters.core.modes import balanced
from peftref.adapters.tlora import (
    TLoRA,
    identity_cores,
    identity_distance,
    identity_penalty,
    orthogonal_penalty,
    product,
    ring_factors,
    ring_matrix,
    transform,
)

DOUBLE = {"dtype": torch.float64}


def ring(dims, rank: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(d, d, rank, rank, generator=g, **DOUBLE) for d in dims]


def one(n_in: int = 6, n_out: int = 4, shake: float = 0.5, **options) -> tuple[nn.Sequential, TLoRA]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n_in, n_out)).double()
    inject(net, TLoRA, ["0"], **options)
    adapter = adapters(net)["0"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(shake * torch.randn_like(p))
    return net, adapter


def lists(tensors) -> list:
    return [t.tolist() for t in tensors]


def schmidt_rank(T: Tensor, a: int, b: int) -> int:
    """How many Kronecker products add up to T."""
    values = torch.linalg.svdvals(T.reshape(a, b, a, b).transpose(1, 2).reshape(a * a, b * b))
    return int((values > 1e-9 * values[0]).sum())


# -- rings


SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4).filter(lambda s: math.prod(s) <= 12)


@settings(max_examples=25, deadline=None)
@given(dims=SIZES, rank=st.integers(1, 3), n=st.sampled_from([0, 1, 40]))
def test_the_transform_is_the_trace_of_paths_round_the_ring(dims: list[int], rank: int, n: int) -> None:
    cores = ring(dims, rank)
    T = torch.tensor(naive.ring_matrix(lists(cores)), **DOUBLE)
    assert_close(ring_matrix(cores), T)
    x = torch.randn(n, len(T), **DOUBLE)
    assert_close(transform(cores, x), x @ T.T)
    assert_close(transform(cores, x.reshape(n, 1, -1) if n else x[:, None]), (x @ T.T)[:, None])


@pytest.mark.parametrize(
    ("dims", "rank", "rows", "dense"),
    [((8, 8), 2, 1, False), ((8, 8), 2, 99, True), ((16, 16), 1, 99, False), ((4, 4, 4), 1, 2, False)],
)
def test_both_ways_to_transform_are_taken_and_agree(monkeypatch, dims, rank: int, rows: int, dense: bool) -> None:
    cores, formed = ring(dims, rank), []
    T = ring_matrix(cores)
    monkeypatch.setattr("peftref.adapters.tlora.ring_matrix", lambda cores: formed.append(1) or T)
    x = torch.randn(rows, len(T), **DOUBLE)
    assert_close(transform(cores, x), x @ T.T)
    assert bool(formed) == dense


@settings(max_examples=20, deadline=None)
@given(n_in=st.integers(1, 8), n_out=st.integers(1, 8), R=st.integers(0, 3), r=st.integers(0, 3),
       order=st.integers(1, 3), rows=st.sampled_from([1, 20]))  # fmt: skip
def test_equal_to_the_naive_form(n_in: int, n_out: int, R: int, r: int, order: int, rows: int) -> None:
    if R + r == 0:
        return
    net, adapter = one(n_in, n_out, transform_rank=R, residual_rank=r, order=order)
    x, base = torch.randn(rows, n_in, **DOUBLE), net[0].base_layer
    args = (base.weight.tolist(), base.bias.tolist(), lists(adapter.A), lists(adapter.B), lists(adapter.C))
    assert_close(net(x), torch.tensor([naive.tlora(row, *args) for row in x.tolist()], **DOUBLE))


def test_closed_forms_of_a_ring() -> None:
    a, b, c = torch.randn(3, 3, **DOUBLE), torch.randn(4, 4, **DOUBLE), torch.randn(2, 2, **DOUBLE)
    slices = [m[..., None, None] for m in (a, b, c)]
    assert_close(ring_matrix(slices[:1]), a)  # D = R = 1: a dense transform
    assert_close(ring_matrix(slices[:2]), torch.kron(a, b))
    assert_close(ring_matrix(slices), torch.kron(torch.kron(a, b), c))
    A, B = ring((3, 4), 2)  # D = 2: a sum of R^2 Kronecker products
    assert_close(ring_matrix([A, B]), sum(torch.kron(A[..., r, s], B[..., s, r]) for r in range(2) for s in range(2)))
    up, down = torch.randn(3, 1, 1, **DOUBLE), torch.randn(4, 1, 1, **DOUBLE)  # R' = 1: an outer product
    left, right = ring_factors([up, up], [down, down])
    flat = [torch.kron(t.flatten(), t.flatten()) for t in (up, down)]
    assert_close(left @ right, torch.outer(*flat))
    # as one tensor, by einsum: the ring b - c closed
    up, down = [torch.randn(n, 2, 2, **DOUBLE) for n in (3, 2)], [torch.randn(n, 2, 2, **DOUBLE) for n in (2, 5)]
    whole = torch.einsum("iab,jbc,kcd,lda->ijkl", *up, *down).reshape(6, 10)
    left, right = ring_factors(up, down)
    assert_close(left @ right, whole)


def test_the_rank_of_the_residual() -> None:
    _, adapter = one(36, 36, transform_rank=0, residual_rank=2)
    dW, _ = adapter.delta(view(nn.Linear(36, 36).double()))
    assert torch.linalg.matrix_rank(dW) == 4 == adapter.residual_rank**2
    _, thin = one(36, 36, transform_rank=0, residual_rank=2, residual="lora")
    assert torch.linalg.matrix_rank(thin.delta(view(nn.Linear(36, 36).double()))[0]) == 2


def test_limits() -> None:
    net, adapter = one(6, 4, transform_rank=1, residual_rank=0, order=1, shake=0)  # a dense transform reaches any W T
    W, wanted = net[0].base_layer.weight, torch.randn(6, 6, **DOUBLE)
    with torch.no_grad():
        adapter.A[0].copy_(wanted[..., None, None])
    x = torch.randn(9, 6, **DOUBLE)
    assert_close(net(x), x @ (W @ wanted).T + net[0].base_layer.bias)
    scale = torch.rand(6, **DOUBLE)
    with torch.no_grad():
        adapter.A[0].copy_(scale.diag()[..., None, None])  # a diagonal: the inputs scaled, as in DoRA with norms held
    assert_close(net(x), (x * scale) @ W.T + net[0].base_layer.bias)
    assert_close(adapter.delta(view(net[0].base_layer))[0], W * (scale - 1))


# -- Propositions 1 and 2, penalties


@pytest.mark.parametrize("init", ["slot", "paper"])
@pytest.mark.parametrize("dims", [(5,), (4, 3), (3, 2, 2), (2, 3, 2, 2)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_both_starts_are_the_identity_to_the_bit(init: str, dims, rank: int) -> None:
    torch.manual_seed(0)
    cores = identity_cores(dims, rank, init)
    assert [tuple(core.shape) for core in cores] == [(d, d, rank, rank) for d in dims]
    assert torch.equal(ring_matrix(cores), torch.eye(math.prod(dims)))
    x = torch.randn(3, math.prod(dims))
    assert torch.equal(transform(cores, x), x)
    assert len({core.untyped_storage().data_ptr() for core in cores}) == len(cores)
    assert all(core.is_contiguous() for core in cores)  # no expanded views, which cannot be saved or trained
    for core, size in zip(cores[:-1], dims, strict=False):
        if init == "slot" and rank > 1:
            assert core[:, :, 1:].std().item() == pytest.approx(1 / math.sqrt(size), rel=0.5)


@pytest.mark.parametrize("dims", [(4, 3), (3, 2, 2), (2, 2, 2, 2)])
def test_slots_all_learn_and_the_papers_slices_stay_equal_for_ever(dims) -> None:
    torch.manual_seed(0)
    target = torch.randn(math.prod(dims), math.prod(dims), **DOUBLE)
    spread = {}
    for init in ("slot", "paper"):
        cores = [core.double().requires_grad_() for core in identity_cores(dims, 2, init)]
        optimizer = torch.optim.Adam(cores, lr=1e-2)
        for _ in range(30):
            loss = (ring_matrix(cores) - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(core.grad.abs().amax((0, 1)).min() > 0 for core in cores)  # every slice
        spread[init] = max((core - core[:, :, :1, :1]).abs().max().item() for core in cores)
        if len(dims) == 2:
            T = ring_matrix(cores).detach()
            assert schmidt_rank(T, *dims) == {"paper": 1, "slot": 4}[init]
    assert spread["paper"] < 1e-12 < 0.01 < spread["slot"]


def test_the_trap_holds_within_a_network() -> None:
    for init, expected in (("paper", 1), ("slot", 4)):
        net, adapter = one(12, 12, shake=0, transform_rank=2, residual_rank=0, init=init)
        x, y = torch.randn(64, 12, **DOUBLE), torch.randn(64, 12, **DOUBLE)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        for _ in range(20):
            loss = (net(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert schmidt_rank(ring_matrix(list(adapter.A)).detach(), 4, 3) == expected


@settings(max_examples=20, deadline=None)
@given(dims=st.sampled_from([(3,), (3, 2), (2, 2, 2)]), r=st.integers(1, 3), s=st.integers(1, 3))
def test_products_of_rings_are_rings(dims, r: int, s: int) -> None:
    a, b = ring(dims, r), ring(dims, s, seed=1)
    cores = product(a, b)
    assert [c.shape[-1] for c in cores] == [r * s] * len(dims)
    assert_close(ring_matrix(cores), ring_matrix(a) @ ring_matrix(b).T)


def test_penalties() -> None:
    for dims in ((4,), (3, 2), (2, 2, 2)):
        cores, eye = ring(dims, 2), torch.eye(math.prod(dims), **DOUBLE)
        T = ring_matrix(cores)
        assert_close(identity_distance(cores), (T - eye).square().sum())
        assert_close(identity_penalty(cores).item(), naive.identity_penalty(lists(cores)))
        assert_close(orthogonal_penalty(cores).item(), naive.identity_penalty(lists(product(cores, cores))))
        start = [core.double() for core in identity_cores(dims, 2, "paper")]
        assert identity_penalty(start) == 0 and orthogonal_penalty(start).abs() < 1e-12
        assert identity_distance(start).abs() < 1e-12
        slot = [core.double().requires_grad_() for core in identity_cores(dims, 2)]
        assert identity_penalty(slot) > 1 and identity_distance(slot).abs() < 1e-12  # one and the same T = I
        gradients = torch.autograd.grad(identity_distance(slot), slot)
        assert max(g.abs().max() for g in gradients) < 1e-12


def test_the_surrogate_depends_on_how_the_matrix_is_written() -> None:
    A, B = ring((3, 4), 2)
    P = torch.tensor([[2.0, 1.0], [0.0, 1.0]], **DOUBLE)  # into the bond and out again
    again = [A @ P, P.inverse() @ B]
    assert_close(ring_matrix(again), ring_matrix([A, B]))
    assert_close(identity_distance(again), identity_distance([A, B]))
    assert abs(identity_penalty(again) - identity_penalty([A, B])) > 1


def test_gradients_of_the_functions() -> None:
    cores = [core.requires_grad_() for core in ring((3, 2), 2)]
    x = torch.randn(2, 6, **DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *c: transform(c, x), (x, *cores))
    for function in (ring_matrix, identity_distance, identity_penalty, orthogonal_penalty):
        assert torch.autograd.gradcheck(lambda *c, function=function: function(c), cores)
    up, down = ([t.requires_grad_() for t in (torch.randn(2, 2, 2, **DOUBLE), torch.randn(3, 2, 2, **DOUBLE))]
                for _ in range(2))  # fmt: skip
    assert torch.autograd.gradcheck(lambda *c: ring_factors(c[:2], c[2:]), (*up, *down))


# -- the adapter


@pytest.mark.parametrize("rows", [3, 40])  # fewer than the weight has, and more
def test_the_transform_goes_to_the_shorter_side(monkeypatch, rows: int) -> None:
    net, adapter = one(12, 10, transform_rank=2, residual_rank=0)
    T, x = ring_matrix(list(adapter.A)), torch.randn(rows, 12, **DOUBLE)
    seen = []
    monkeypatch.setattr("peftref.adapters.tlora.transform", lambda c, x: seen.append(len(x)) or transform(c, x))
    assert_close(net(x), x @ (net[0].base_layer.weight @ T).T + net[0].base_layer.bias)
    assert seen == [min(rows, 10)]


@pytest.mark.parametrize("residual", ["tr", "lora"])
def test_a_residual_alone_stays_thin(monkeypatch, residual: str) -> None:
    net, adapter = one(12, 10, transform_rank=0, residual_rank=2, residual=residual)
    x, (dW, _) = torch.randn(40, 12, **DOUBLE), adapter.delta(view(net[0].base_layer))
    monkeypatch.setattr(TLoRA, "delta", None)
    assert_close(net(x), net[0].base_layer(x) + x @ dW.T)


def test_parameters_and_defaults() -> None:
    layer = view(nn.Linear(1280, 1280))
    count = {
        "transform": sum(p.numel() for p in TLoRA(layer, residual_rank=0).parameters()),
        "ring": sum(p.numel() for p in TLoRA(layer, transform_rank=0, residual_rank=4).parameters()),
        "lora": sum(p.numel() for p in TLoRA(layer, transform_rank=0, residual_rank=4, residual="lora").parameters()),
    }
    assert count == {"transform": 4 * (40**2 + 32**2), "ring": 16 * (72 + 72), "lora": 4 * 2560}
    default = TLoRA(layer)
    assert (default.transform_rank, default.residual_rank, default.order) == (2, 6, 2)
    assert (default.init, default.residual) == ("slot", "tr")


def test_the_width_of_the_residuals_start() -> None:
    torch.manual_seed(0)
    adapter = TLoRA(view(nn.Linear(1024, 256)), transform_rank=0, residual_rank=9)
    assert not adapter.B[0].any()
    for core, size in ((adapter.B[1], 16), (adapter.C[0], 32), (adapter.C[1], 32)):
        assert core.std().item() == pytest.approx(1 / (size * 3), rel=0.1)
    thin = TLoRA(view(nn.Linear(1024, 256)), transform_rank=0, residual="lora")
    assert not thin.B[0].any() and thin.C[0].abs().max() <= 1 / 32 < 33 * thin.C[0].abs().max()


def test_every_option_changes_the_output() -> None:
    x = torch.randn(2, 6, **DOUBLE)
    options = ({}, {"transform_rank": 1}, {"residual_rank": 1}, {"order": 3}, {"init": "paper"}, {"residual": "lora"},
               {"transform_rank": 0}, {"residual_rank": 0})  # fmt: skip
    outputs = [one(**o)[0](x) for o in options]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("rows", [2, 50])
@pytest.mark.parametrize(("R", "r"), [(2, 2), (2, 0), (0, 2)])
def test_increment_and_whole_output_are_the_same_layer(rows: int, R: int, r: int) -> None:
    layer = nn.Linear(12, 10).double()
    base = view(layer)
    adapter = TLoRA(base, transform_rank=R, residual_rank=r).double()
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(rows, 3, 12, dtype=torch.double)
    expected = x @ (layer.weight + adapter.delta(base)[0]).T + layer.bias
    assert_close(layer(x) + adapter(x, layer(x), base), expected)
    whole = adapter.whole(x, base)
    assert (whole is None) == (R == 0)
    if whole is not None:
        assert_close(whole, expected)


def test_several_transforms_each_read_the_frozen_weight() -> None:
    net, first = one(6, 4, transform_rank=2, residual_rank=0)
    inject(net, TLoRA, ["0"], name="second", transform_rank=2, residual_rank=0)
    second = adapters(net, "second")["0"]
    with torch.no_grad():
        second.A[0].add_(0.5)
    activate(net, "default", "second")
    W, eye = net[0].base_layer.weight, torch.eye(6, **DOUBLE)
    T, S = (ring_matrix(list(a.A)) for a in (first, second))
    merge(net)
    assert_close(net[0].weight.data, (W @ (T + S - eye)).data)
    assert not torch.allclose(net[0].weight, W @ T @ S)


def test_sizes_that_do_not_split() -> None:
    assert balanced(67, 2) == (67, 1) and balanced(1, 3) == (1, 1, 1) and balanced(2**10, 2) == (32, 32)
    for n in range(1, 40):
        for parts in (1, 2, 3):
            found = balanced(n, parts)
            assert math.prod(found) == n and len(found) == parts and list(found) == sorted(found, reverse=True)
    net = nn.Sequential(nn.Linear(67, 3))
    with pytest.raises(ValueError, match=r"expected factors of in_features .*, 4489, got \(67, 1\)"):
        inject(net, TLoRA, ["0"], transform_rank=1)
    assert type(net[0]) is nn.Linear
    inject(net, TLoRA, ["0"], transform_rank=1, order=1)  # asked for
    inject(net, TLoRA, ["0"], name="residual", transform_rank=0)
    assert adapters(net)["0"].A[0].shape == (67, 67, 1, 1) and not len(adapters(net, "residual")["0"].A)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transform_rank": -1}, "transform_rank: expected an integer >= 0, got -1"),
        ({"transform_rank": True}, "transform_rank: expected an integer >= 0, got True"),
        ({"residual_rank": 2.0}, "residual_rank: expected an integer >= 0, got 2.0"),
        ({"order": 0}, "order: expected an integer >= 1, got 0"),
        ({"transform_rank": 0, "residual_rank": 0}, "expected one of them above 0, got 0 and 0"),
        ({"init": "zero"}, r"init: expected one of \['slot', 'paper'\], got 'zero'"),
        ({"residual": "tt"}, r"residual: expected one of \['tr', 'lora'\], got 'tt'"),
    ],
)
def test_bad_options_change_nothing(options: dict, said: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=said):
        inject(net, TLoRA, ["0", "1"], per_layer={"1": options})
    assert type(net[0]) is nn.Linear and all(p.requires_grad for p in net.parameters())


def test_modes_of_ones_own(tmp_path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 8)).double(), torch.randn(5, 12).double()
    twin = copy.deepcopy(net)
    inject(net, TLoRA, ["0"], out_modes=[2, 4], in_modes=[2, 3, 2], transform_rank=2, residual_rank=2)
    adapter = adapters(net)["0"]
    assert [len(core) for core in adapter.A] == [2, 3, 2] == [len(core) for core in adapter.C]
    assert [len(core) for core in adapter.B] == [2, 4]
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.5)
    W = net[0].weight @ ring_matrix(list(adapter.A)) + torch.mm(*adapter.factors())
    assert_close(net(x), x @ W.T + net[0].bias)
    save(net, tmp_path)
    load(twin, tmp_path)
    assert torch.equal(twin(x), net(x))
    for wrong in ({"out_modes": [2, 3]}, {"in_modes": [12, 0]}, {"in_modes": "12"}, {"in_modes": [4.0, 3.0]}):
        with pytest.raises(ValueError, match="_modes: expected a number of modes, or sizes with the product"):
            inject(nn.Sequential(nn.Linear(12, 8)), TLoRA, ["0"], **wrong)
