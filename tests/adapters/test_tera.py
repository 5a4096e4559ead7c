"""TeRA alone: the network against the elementwise sum, its limits, Theorem 3, and the bank that layers share."""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.adapters.core.bank import Bank
from peftref.adapters.core.files import load, save
from peftref.adapters.core.injection import adapters, inject, merge
from peftref.adapters.core.layers import view
from peftref.adapters.tera import TeRA, error_terms, expand, multiply, rank_bound, rank_one, update
from tests._naive.tera import tera as naive_tera

DOUBLE = {"dtype": torch.float64}
MODES = st.lists(st.integers(1, 3), min_size=1, max_size=3)


def network(
    left, right, caps=(9,), seed: int = 0
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """A core, factors and vectors for these modes; ``R_n = min(I_n, cap)``."""
    g = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=g, **DOUBLE)
    ranks = [[min(size, caps[n % len(caps)]) for n, size in enumerate(side)] for side in (left, right)]
    factors = [
        [draw(r, size) for r, size in zip(rs, side, strict=True)] for rs, side in zip(ranks, (left, right), strict=True)
    ]
    return draw(*map(math.prod, ranks)), *factors, *([draw(r) for r in rs] for rs in ranks)


def one(n_in: int = 6, n_out: int = 4, shake: float = 0.7, **options) -> tuple[nn.Sequential, TeRA]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n_in, n_out)).double()
    inject(net, TeRA, ["0"], **options)
    adapter = adapters(net)["0"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(shake * torch.randn_like(p))
    return net, adapter


# -- the update


@settings(max_examples=25, deadline=None)
@given(left=MODES, right=MODES, cap=st.integers(1, 3))
def test_equal_to_the_elementwise_sum(left: list[int], right: list[int], cap: int) -> None:
    parts = network(left, right, (cap,))
    core, *lists = parts
    expected = naive_tera(core.tolist(), *([t.tolist() for t in some] for some in lists))
    assert_close(update(*parts), torch.tensor(expected, **DOUBLE))


@pytest.mark.parametrize("left", [(6,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("right", [(5,), (4, 2), (3, 2, 2)])
def test_matrix_form_and_the_rows_that_are_never_dense(left, right) -> None:
    core, A, B, c, d = network(left, right, (2, 9))
    L, M = functools.reduce(torch.kron, A).T, functools.reduce(torch.kron, B)
    dW = L @ torch.diag(expand(c)) @ core @ torch.diag(expand(d)) @ M
    assert_close(update(core, A, B, c, d), dW)
    x = torch.randn(7, math.prod(right), **DOUBLE)
    z = (multiply(x, B) * expand(d)) @ core.T * expand(c)
    assert_close(multiply(z, [f.T for f in A]), x @ dW.T)
    assert multiply(x[:0], B).shape == (0, M.shape[0]) and multiply(x[0], B).shape == (M.shape[0],)


def test_one_einsum_over_all_modes() -> None:
    core, (a, b), (c, d), (u, v), (w, z) = network((3, 2), (2, 4))
    whole = torch.einsum("pqrs,p,q,r,s,pi,qj,rk,sl->ijkl", core.reshape(3, 2, 2, 4), u, v, w, z, a, b, c, d)
    assert_close(update(core, (a, b), (c, d), (u, v), (w, z)), whole.reshape(6, 8))


@settings(max_examples=20, deadline=None)
@given(n_in=st.sampled_from([1, 5, 6, 12]), n_out=st.sampled_from([1, 4, 7, 8]), out_modes=st.integers(1, 3),
       in_modes=st.integers(1, 3), r=st.sampled_from([None, 1, 3]), rows=st.sampled_from([1, 50]))  # fmt: skip
def test_the_layer_is_the_update(n_in, n_out, out_modes, in_modes, r, rows) -> None:
    net, adapter = one(n_in, n_out, out_modes=out_modes, in_modes=in_modes, r=r)
    dW = update(*adapter.network.parts(torch.zeros(1, **DOUBLE)), list(adapter.d_left), list(adapter.d_right))
    assert dW.shape == (n_out, n_in)
    x = torch.randn(rows, n_in, **DOUBLE)
    assert_close(net(x), net[0].base_layer(x) + x @ dW.T)


@pytest.mark.parametrize(("rows", "dense"), [(2, False), (200, True)])
def test_both_ways_are_taken(monkeypatch, rows: int, dense: bool) -> None:
    net, adapter = one(12, 12)
    formed, delta = [], adapter.delta
    monkeypatch.setattr(adapter, "delta", lambda base: formed.append(1) or delta(base))
    net(torch.randn(rows, 12, **DOUBLE))
    assert bool(formed) == dense


def test_counts_of_the_paper() -> None:
    def count(modes) -> int:  # R_n = I_n
        return sum(modes)

    assert 64 * count((4096, 16, 16, 16)) == 265_216 and 64 * count((4096, 64, 64)) == 270_336
    for out_modes, in_modes, expected in ((1, 2, 96 + 12 + 8), (2, 2, 40), ([96], [4, 4, 6], 110), (1, 9, 96 + 13)):
        adapter = TeRA(view(nn.Linear(96, 96)), out_modes=out_modes, in_modes=in_modes)
        assert sum(p.numel() for p in adapter.parameters()) == expected
    assert [len(d) for d in TeRA(view(nn.Linear(67, 4))).d_right] == [67]  # a prime stays whole


def test_a_rank_is_at_most_the_size_of_its_mode() -> None:
    adapter = TeRA(view(nn.Linear(12, 4)), out_modes=1, in_modes=[2, 6], r=3)  # modes of 4, 2 and 6
    assert [len(d) for d in (*adapter.d_left, *adapter.d_right)] == [3, 2, 3]


# -- limiting cases


def test_vera_is_a_limit() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    vera = peft.get_peft_model(model, peft.VeraConfig(r=3, target_modules=["0"]))
    layer = vera.base_model.model[0]
    with torch.no_grad():
        for p in (layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]):
            p.copy_(torch.randn_like(p))
    B, A = layer.vera_B["default"], layer.vera_A["default"]  # (o, r), (r, i)
    b, d = layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]
    ours = update(B, [torch.eye(6)], [A], [b], [d])
    assert_close(ours, layer.get_delta_weight("default"))
    assert_close(ours, b[:, None] * B @ (d[:, None] * A))

    net = nn.Sequential(nn.Linear(6, 6))  # and as a layer, in a network that holds VeRA's matrices
    net.load_state_dict(
        {k.rpartition("base_layer.")[2]: v for k, v in layer.state_dict().items() if "base" in k}, False
    )
    net[0].load_state_dict(layer.base_layer.state_dict())
    inject(net, TeRA, ["0"], in_modes=1)
    adapter = adapters(net)["0"]
    with torch.no_grad():
        adapter.network.core, adapter.network.left_0, adapter.network.right_0 = B.clone(), torch.eye(6), A.clone()
        adapter.d_left[0].copy_(b)
        adapter.d_right[0] = nn.Parameter(d.clone())
    x = torch.randn(4, 6)
    assert_close(net(x), vera(x), rtol=1e-5, atol=1e-6)


def test_all_ranks_one_is_an_outer_product() -> None:
    _, adapter = one(6, 4, out_modes=2, in_modes=2, r=1)
    dW, _ = adapter.delta(None)
    assert torch.linalg.matrix_rank(dW) == 1
    core, (a, b), (c, d) = adapter.network.parts(dW)
    expected = torch.outer(torch.kron(a[0], b[0]), torch.kron(c[0], d[0])) * core * expand(list(adapter.d_left))
    assert_close(dW, (expected * expand(list(adapter.d_right))).detach(), check_dtype=False)


@settings(max_examples=20, deadline=None)
@given(left=MODES, right=MODES, cap=st.integers(1, 3))
def test_the_rank(left: list[int], right: list[int], cap: int) -> None:
    core, A, B, c, d = network(left, right, (cap,))
    bound = rank_bound([len(f) for f in A], [len(f) for f in B])
    values = torch.linalg.svdvals(update(core, A, B, [v.sign() for v in c], [v.sign() for v in d]))
    assert int((values > 1e-10 * values[0]).sum()) == bound


def test_gauges_change_nothing() -> None:
    core, A, B, (u, v), (w, z) = network((3, 2), (2, 4))
    assert_close(update(core, A, B, (u * 3, v), (w / 3, z)), update(core, A, B, (u, v), (w, z)))
    assert_close(update(core * 2, A, B, (u, v), (w, z)), update(core, A, B, (u, v), (w, z * 2)))


def test_one_zero_vector_learns_and_two_never_do() -> None:
    for dead in (False, True):
        net, adapter = one(8, 6, shake=0)
        if dead:
            nn.init.zeros_(adapter.d_right[0])
        start = [p.clone() for p in adapter.parameters()]
        x = torch.randn(9, 8, **DOUBLE)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
        for _ in range(3):
            loss = (net(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if dead:
                assert not any(p.grad.any() for p in adapter.parameters())
            optimizer.step()
        assert all(torch.equal(p, q) == dead for p, q in zip(adapter.parameters(), start, strict=True))
    net, adapter = one(8, 6, shake=0)
    net(x).sum().backward()
    assert adapter.d_left[0].grad.all() and not any(d.grad.any() for d in adapter.d_right)  # at first d^(1) alone


def test_gradients() -> None:
    core, *lists = network((3, 2), (2, 2), (2,))
    tensors = [t.requires_grad_() for t in (core, *(t for some in lists for t in some))]

    def run(core, *rest):
        return update(core, rest[:2], rest[2:4], rest[4:6], rest[6:])

    assert torch.autograd.gradcheck(run, tensors)


# -- Theorem 3


def squared_error(target: Tensor, core, left, right, d_left, d_right) -> float:
    return (target - update(core, left, right, d_left, d_right)).square().sum().item()


SHORT = st.lists(st.integers(2, 3), min_size=1, max_size=2)


@settings(max_examples=30, deadline=None)
@given(left=SHORT, right=SHORT, cap=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_bound_holds_with_the_square(left, right, cap: int, seed: int) -> None:
    core, A, B, *_ = network(left, right, (cap,), seed)
    target = torch.randn(math.prod(left), math.prod(right), generator=torch.Generator().manual_seed(seed + 1), **DOUBLE)
    unreachable, few, vectors = error_terms(target, core, A, B)
    error = squared_error(target, core, A, B, *vectors)
    assert error <= (unreachable + few) * (1 + 1e-9)
    if cap == 3:  # every factor invertible
        assert unreachable < 1e-12 * target.square().sum()
    if cap == 1:  # one number can be scaled: the projection itself, and nothing is lost to the vectors
        assert few < 1e-9 and error == pytest.approx(unreachable.item())


def test_the_first_power_of_the_paper_does_not_hold() -> None:
    """With A = I and a constant core the best error is known: what the largest singular value leaves."""
    target = torch.tensor([[1.5, 0.3, 0.2, 1.0], [0.1, 1.4, 1.1, 0.2]], **DOUBLE)
    core, A, B = torch.full((2, 4), 100.0, **DOUBLE), [torch.eye(2, **DOUBLE)], [torch.eye(4, **DOUBLE)]
    best = torch.linalg.svdvals(target)[1].square()
    unreachable, few, vectors = error_terms(target, core, A, B)
    assert squared_error(target, core, A, B, *vectors) == pytest.approx(best.item())
    assert few == pytest.approx(8 * best.item()) and unreachable < 1e-20
    assert few / core.max() < best / 10  # what is printed: below an error that nothing can undercut


def test_rank_one_tensors_are_found() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=g, **DOUBLE) for n in (3, 4, 2)]
    tensor = torch.einsum("i,j,k->ijk", *parts)
    length, vectors = rank_one(tensor)
    assert_close(length * torch.einsum("i,j,k->ijk", *vectors), tensor)
    matrix = torch.randn(4, 5, generator=g, **DOUBLE)
    assert_close(rank_one(matrix, 200)[0], torch.linalg.svdvals(matrix)[0])
    noisy = tensor + 0.1 * torch.randn(3, 4, 2, generator=g, **DOUBLE)
    length, vectors = rank_one(noisy)
    assert length <= noisy.norm()
    assert_close(length, torch.einsum("ijk,i,j,k->", noisy, *vectors))  # an overlap that is really there
    assert rank_one(torch.zeros(2, 2))[0] == 0


# -- the bank


def deep() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


def stirred(**options) -> nn.Sequential:
    net = deep()
    inject(net, TeRA, ["0", "2", "4"], **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for adapter in adapters(net).values():
            for p in adapter.parameters():
                p.copy_(torch.randn_like(p))
    return net


def test_one_bank_for_each_shape() -> None:
    net = stirred(bank=Bank(3))
    a, b, c = adapters(net).values()
    assert a.network is b.network and a.network is not c.network and a.seed == 3
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 11 + 11 + 9
    net.double()
    assert a.network is b.network and a.network.core.dtype == torch.float64
    lonely = stirred(seed=3)  # without one: the same numbers, not the same place
    x = torch.randn(5, 6)
    assert_close(lonely(x), net.float()(x))
    first, second, _ = adapters(lonely).values()
    assert first.network is not second.network and torch.equal(first.network.core, second.network.core)
    assert not torch.allclose(stirred(seed=4)(x), lonely(x))


def test_layers_of_one_bank_on_two_types_are_right_still() -> None:
    bank, x = Bank(), torch.randn(5, 6)
    y = stirred(bank=bank)(x)
    net = stirred(bank=bank)
    net[0].double()  # takes the bank of that shape along; layer 2, in float32, reads it in its own type
    assert_close(net[1:](net[0](x.double()).float()), y)


def test_what_is_drawn_does_not_depend_on_the_process_or_its_defaults() -> None:
    script = (
        "import torch; from torch import nn; from peftref.adapters import Bank; torch.manual_seed(5);"
        "torch.set_default_dtype(torch.float64); torch.set_default_device('meta');"
        "n = Bank(7).network([(6, 6)], [(3, 3), (2, 2)], 'random', False);"
        "print([t.double().sum(dtype=torch.float64).item().hex() for t in n.buffers()])"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    here = Bank(7).network([(6, 6)], [(3, 3), (2, 2)], "random", False)
    assert there.strip() == str([t.double().sum().item().hex() for t in here.buffers()])
    assert not torch.equal(here.core, Bank(7).network([(6, 6)], [(2, 2), (3, 3)], "random", False).core)


def test_the_scale_of_the_bank() -> None:
    adapter = TeRA(view(nn.Linear(256, 200)), in_modes=2)
    core, (left,), right = adapter.network.parts(torch.zeros(1))
    assert core.std().item() == pytest.approx(1 / 16, rel=0.02) and left.std().item() == pytest.approx(
        200**-0.5, rel=0.02
    )
    ones = [torch.ones(200)], [torch.ones(16), torch.ones(16)]
    spread = update(core, [left], right, *ones).std().item()
    assert spread == pytest.approx(1 / 16, rel=0.3)  # few factors of 16 numbers, so roughly


def test_the_scale_of_the_bank_at_a_small_rank() -> None:
    """A factor's variance is one over its rank, not over its mode: only so do the entries keep the core's variance."""
    adapter = TeRA(view(nn.Linear(400, 300)), in_modes=2, r=10)
    core, factors, right = adapter.network.parts(torch.zeros(1))
    assert [factor.shape for factor in (*factors, *right)] == [(10, 300), (10, 20), (10, 20)]
    for factor in (*factors, *right):
        assert factor.std().item() == pytest.approx(10**-0.5, rel=0.2)  # by the mode: 0.06 and 0.22
    dW = [update(torch.randn(10, 100, generator=torch.Generator().manual_seed(i)) / 10, factors, right,
                 [torch.ones(10)], [torch.ones(10)] * 2).square().mean() for i in range(30)]  # fmt: skip
    assert torch.stack(dW).mean().item() == pytest.approx(1 / 100, rel=0.2)


def test_files_hold_the_vectors_and_the_bank_if_asked(tmp_path) -> None:
    x = torch.randn(5, 6)
    net = stirred(bank=Bank(3))
    save(net, tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 31
    for extra in ({}, {"bank": Bank(3)}):
        again = deep()
        load(again, tmp_path / "small", **extra)
        assert torch.equal(again(x), net(x)) and adapters(again)["0"].seed == 3
    with pytest.raises(ValueError, match="seed: expected that of the bank, 4, or None, got 3"):
        load(deep(), tmp_path / "small", bank=Bank(4))

    net = stirred(bank=Bank(3), save_bank=True)
    with torch.no_grad():
        adapters(net)["0"].network.core.mul_(2)  # as if another torch had drawn it
    save(net, tmp_path / "large")
    tensors = load_file(tmp_path / "large" / "adapter_model.safetensors")
    assert sum("core" in key for key in tensors) == 2  # once for each shape
    again = deep()
    load(again, tmp_path / "large", bank=Bank(3))
    assert torch.equal(again(x), net(x))


# -- options


def test_every_option_changes_the_output() -> None:
    x = torch.randn(2, 12, **DOUBLE)
    options = (
        {},
        {"out_modes": 2},
        {"in_modes": 1},
        {"in_modes": [2, 6]},
        {"r": 2},
        {"factors": "identity"},
        {"seed": 1},
    )
    outputs = [one(12, 12, shake=0.7, **o)[0](x) for o in options]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    _, plain = one(12, 12, factors="identity")
    core, _, _ = plain.network.parts(x)
    expected = expand(list(plain.d_left))[:, None] * core * expand(list(plain.d_right))
    assert_close(plain.delta(None)[0], expected)


def test_merging_is_one_more_matrix() -> None:
    net, adapter = one(12, 10)
    x = torch.randn(3, 12, **DOUBLE)
    y, W = net(x), net[0].base_layer.weight
    merge(net)
    assert_close(net(x), y)
    assert torch.linalg.matrix_rank(net[0].weight - W) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out_modes": 0}, "out_modes: expected a number of modes, or sizes with the product 3, got 0"),
        ({"out_modes": True}, "out_modes: expected a number of modes"),
        ({"in_modes": [2, 3]}, r"in_modes: expected a number of modes, or sizes with the product 4, got \[2, 3\]"),
        ({"in_modes": [4.0]}, "in_modes: expected a number of modes"),
        ({"in_modes": []}, "in_modes: expected a number of modes"),
        ({"in_modes": "22"}, "in_modes: expected a number of modes"),
        ({"r": 0}, "r: expected an integer >= 1, got 0"),
        ({"factors": "eye"}, r"factors: expected one of \['random', 'identity', 'given'\], got 'eye'"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"seed": 2**31}, r"seed: expected an integer in \[0, 2\^31\), got 2147483648"),
        ({"seed": 2, "bank": Bank(1)}, "seed: expected that of the bank, 1, or None, got 2"),
    ],
)
def test_bad_options_change_nothing(options: dict, said: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=said):
        inject(net, TeRA, ["0", "1"], per_layer={"1": options})
    assert type(net[0]) is nn.Linear and all(p.requires_grad for p in net.parameters())


# -- tensors, ranks and modes of one's own


def test_given_tensors(tmp_path) -> None:
    torch.manual_seed(0)
    core, left, right = torch.randn(4, 6), [torch.randn(4, 8)], [torch.randn(2, 3), torch.randn(3, 4)]
    x = torch.randn(5, 12)

    def plain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8))

    options = {"out_modes": [8], "in_modes": [3, 4], "r": [4, 2, 3], "factors": "given"}
    for saved in (False, True):
        net = plain()
        inject(net, TeRA, ["0"], bank=Bank(given=[(core, left, right)]), save_bank=saved, **options)
        adapter = adapters(net)["0"]
        for p in adapter.parameters():
            nn.init.normal_(p)
        u = adapter.d_left[0]
        v = torch.kron(*adapter.d_right)
        dW = left[0].T @ torch.diag(u) @ core @ torch.diag(v) @ torch.kron(*right)
        assert_close(net(x), net[0].base_layer(x) + x @ dW.T)
        save(net, tmp_path)
        other = plain()
        if not saved:
            with pytest.raises(ValueError, match="bank: expected the bank that was given the tensors, got None"):
                load(other, tmp_path)
            with pytest.raises(ValueError, match="bank: expected one that was given tensors for"):
                load(other, tmp_path, bank=Bank())
        load(other, tmp_path, **({} if saved else {"bank": Bank(given=[(core, left, right)])}))
        assert torch.equal(other(x), net(x))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([3], r"given: expected \(core, left, right\) of each shape, got 3"),
        ([(torch.ones(4, 6), [torch.ones(4, 8)], [])], "given: expected a core and factors that are matrices"),
        ([(torch.ones(4, 5), [torch.ones(4, 8)], [torch.ones(6, 6)])], r"given: expected a core \[4, 6\] for these"),
        ([(torch.ones(1, 1), [torch.ones(1, 8)], [torch.full((1, 2), torch.nan)])], "given: expected finite"),
        ([(torch.ones(1, 1), [torch.ones(1, 8)], [torch.ones(1, 2)])] * 2, "one set of tensors for each shape"),
    ],
)
def test_given_tensors_that_do_not_fit(tensors, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Bank(given=tensors)


def test_a_rank_for_each_mode() -> None:
    net = nn.Sequential(nn.Linear(12, 8))
    inject(net, TeRA, ["0"], out_modes=[4, 2], in_modes=[3, 4], r=[3, 1, 2, 4])
    adapter = adapters(net)["0"]
    assert [len(d) for d in adapter.parameters()] == [3, 1, 2, 4] and adapter.network.core.shape == (3, 8)
    for p in adapter.parameters():
        nn.init.normal_(p)
    assert int(torch.linalg.matrix_rank(adapter.delta(None)[0])) == rank_bound([3, 1], [2, 4]) == 3
    for r in ([3, 1, 2], [3, 1, 2, 0], [3, 1, 2, 1.5]):
        with pytest.raises(ValueError, match="r: expected"):
            inject(nn.Sequential(nn.Linear(12, 8)), TeRA, ["0"], out_modes=[4, 2], in_modes=[3, 4], r=r)
