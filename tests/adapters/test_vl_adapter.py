"""VL-Adapter: sharing over tasks, Kronecker products, the hyper-network; the rest is in test_contract."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.adapters.baselines.hyperformer import Hyperformer, HyperNet, places
from peftref.adapters.core.files import load, save, state
from peftref.adapters.core.injection import adapters, build, inject, install
from peftref.adapters.core.layers import view
from peftref.adapters.core.phm import PHM, Rule, phm_linear, phm_weight
from peftref.adapters.core.switch import Tasks
from peftref.adapters.vl_adapter import SHARING, Stack, VLAdapter, affine, bottleneck
from tests._naive import vl_adapter as naive

F64 = torch.float64
NAMES = ["vqa", "gqa", "nlvr"]


def net(d: int = 4, layers: int = 2, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(d, d) for _ in range(layers))).to(dtype)


@torch.no_grad()
def shake(model: nn.Module, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))


def made(sharing: str, d: int = 4, **options) -> tuple[nn.Sequential, Tasks]:
    model, tasks = net(d), Tasks(NAMES)
    inject(model, VLAdapter, ["0", "1"], reduction=2, sharing=sharing, tasks=tasks, **options)
    shake(model)
    return model, tasks


def increments(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[0](x) - model[0].base_layer(x)


# -- the bottleneck and its sharing


@settings(max_examples=30, deadline=None)
@given(
    sharing=st.sampled_from(SHARING), d=st.integers(1, 5), reduction=st.sampled_from([0.5, 1, 2, 3, 8]),
    task=st.lists(st.integers(0, 2), min_size=0, max_size=5),
)  # fmt: skip
def test_equal_to_the_naive_form(sharing: str, d: int, reduction: float, task: list[int]) -> None:
    model, tasks = net(d), Tasks(NAMES)
    inject(model, VLAdapter, ["0"], reduction=reduction, sharing=sharing, tasks=tasks)
    shake(model)
    adapter = adapters(model)["0"]
    assert adapter.down.weight.shape[1] == max(1, int(d / reduction))  # rounded down, at least one
    tasks.use(torch.tensor(task, dtype=torch.long))
    rows = torch.randn(len(task), d, dtype=F64)
    halves = (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
    expected = naive.shared(rows.tolist(), task, *(t.tolist() for t in halves))
    got = adapter(None, rows, view(model[0].base_layer))
    assert_close(got, torch.tensor(expected, dtype=F64).reshape(len(task), d))


@pytest.mark.parametrize("sharing", SHARING)
def test_a_mixed_batch_is_the_batches_of_its_tasks(sharing: str) -> None:
    model, tasks = made(sharing)
    x, task = torch.randn(6, 3, 2, 4, dtype=F64), torch.tensor([2, 0, 0, 2, 0, 2])  # of "gqa" there is none
    tasks.use(task)
    y = model(x)
    for t, name in enumerate(NAMES):
        tasks.use(name)
        assert_close(model(x)[task == t], y[task == t])
    tasks.use([NAMES[t] for t in task])
    assert torch.equal(model(x), y)
    if sharing != "single":
        tasks.use("gqa")
        assert not torch.allclose(model(x)[0], y[0])


def test_who_reads_the_task() -> None:
    x, changed = torch.ones(1, 4, dtype=F64), {}
    for sharing in SHARING:
        model, tasks = made(sharing)
        outputs = []
        for name in NAMES:
            tasks.use(name)
            outputs.append(model(x))
        changed[sharing] = not torch.allclose(outputs[0], outputs[1])
        shapes = {n: len(p) for n, p in adapters(model)["0"].named_parameters()}
        own = {"down": sharing in ("multiple", "half-up"), "up": sharing in ("multiple", "half-down")}
        assert shapes == {f"{half}.{part}": 3 if own[half] else 1 for half in own for part in ("weight", "bias")}
    assert changed == {"single": False, "multiple": True, "half-up": True, "half-down": True}


@pytest.mark.parametrize("sharing", SHARING)
def test_the_gradient_of_a_shared_half_is_the_sum_over_tasks(sharing: str) -> None:
    """eq-vl_adapter-gradient: one mixed batch against a backward pass for each task."""
    model, tasks = made(sharing)
    x, task = torch.randn(9, 4, dtype=F64), torch.arange(9) % 3
    params = dict(adapters(model)["0"].named_parameters())
    tasks.use(task)
    together = torch.autograd.grad(model(x).square().sum(), [*params.values()])
    each = []
    for t, name in enumerate(NAMES):
        tasks.use(name)
        each.append(torch.autograd.grad(model(x[task == t]).square().sum(), [*params.values()]))
    for (name, p), joint, parts in zip(params.items(), together, zip(*each, strict=True), strict=True):
        assert_close(joint, sum(parts))
        for t, part in enumerate(parts):
            if len(p) == 3:  # its own: the other tasks have no say
                assert part[t].any() and not part[[k for k in range(3) if k != t]].any(), name
            else:
                assert part.any()


def test_gradcheck_of_a_mixed_batch() -> None:
    for options in ({}, {"phm": 2}, {"phm": 2, "rank": 1}):
        model, tasks = made("half-down", **options)
        tasks.use(torch.tensor([0, 2]))
        adapter, x = adapters(model)["0"], torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
        names, values = zip(*adapter.named_parameters(), strict=True)

        def run(x: Tensor, *values: Tensor, adapter=adapter, names=names) -> Tensor:
            own = dict(zip(names, values, strict=True))
            return torch.func.functional_call(adapter, own, (x, x, None))

        values = [p.detach().requires_grad_() for p in values]
        assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def test_affine_with_one_matrix_each_is_that_matrix_row_by_row() -> None:
    h, W, b = (torch.randn(*shape, dtype=F64) for shape in ((3, 2, 5, 4), (3, 6, 4), (3, 6)))
    assert_close(affine(h, W, b), torch.stack([F @ M.T + c for F, M, c in zip(h, W, b, strict=True)]))
    assert affine(h[:0], W[:0], b[:0]).shape == (0, 2, 5, 6)
    assert_close(affine(h[:, 0, 0], W, b), affine(h, W, b)[:, 0, 0])
    for wrong in (h[:2], h[0, 0, 0]):
        with pytest.raises(ValueError, match="tasks: expected the task of each of the 3 elements"):
            affine(wrong, W, b)


def test_limits_of_the_bottleneck() -> None:
    h = torch.randn(7, 4, dtype=F64)
    D, b, c = torch.randn(2, 4, dtype=F64), torch.randn(2, dtype=F64), torch.randn(4, dtype=F64)
    zero = torch.zeros(4, 2, dtype=F64)
    assert torch.equal(bottleneck(h, D, b, zero, c), c.expand(7, 4))
    U = torch.randn(4, 2, dtype=F64)
    assert_close(bottleneck(h, D, b + 50, U, c), (h @ D.T + b + 50) @ U.T + c)  # far right, GELU is the identity
    assert_close(bottleneck(h, D, b - 50, U, c), c.expand(7, 4))  # far left, zero


def test_equal_to_transformers_gelu_new() -> None:
    from transformers.activations import ACT2FN

    h, eye, zero = torch.linspace(-4, 4, 50, dtype=F64)[:, None], torch.ones(1, 1, dtype=F64), torch.zeros(1, dtype=F64)
    assert_close(bottleneck(h, eye, zero, eye, zero), ACT2FN["gelu_new"](h))


def test_the_paper_starts_elsewhere() -> None:
    model, tasks = net(64), Tasks(["all"])
    x, before = torch.randn(3, 64, dtype=F64), net(64)(torch.zeros(1, 64, dtype=F64))
    inject(model, VLAdapter, ["0"], init="paper", tasks=tasks)
    adapter = adapters(model)["0"]
    for half, fan_in in (("down", 64), ("up", 8)):
        module, peer = getattr(adapter, half), nn.Linear(fan_in, 4096)
        for part in ("weight", "bias"):
            p, q = getattr(module, part), getattr(peer, part)
            assert p.abs().max() <= 1 / fan_in**0.5
            assert_close(p.std().float(), q.std(), rtol=0.35, atol=0)
    assert not torch.equal(model(x), net(64)(x)) and before.any()


# -- the counts of the paper


BART, LAYER_NORMS, VISUAL = 139_420_416, 49_152, 1_580_000  # the last one rounded: a projection of 2048 to 768 and more
D, REDUCTION, SITES, TASKS = 768, 8, 30, 4


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "numbers", "percent"),
    [
        ({}, 4_449_600, 4.18),
        ({"sharing": "multiple"}, 17_798_400, 12.23),
        ({"sharing": "half-up"}, 11_093_760, 8.37),
        ({"phm": 2}, 2_238_240, 2.70),
        ({"phm": 2, "sharing": "multiple"}, 8_952_960, 7.06),
    ],
)
def test_trainable_shares_of_vl_bart(options: dict, numbers: int, percent: float) -> None:
    base = view(nn.Linear(1, D, device="meta"))
    one = VLAdapter(base, REDUCTION, tasks=Tasks(list("abcd")), **options)
    assert SITES * count(one) == numbers
    trained = numbers + VISUAL + LAYER_NORMS
    assert round(100 * trained / (BART + VISUAL + numbers), 2) == pytest.approx(percent, abs=0.011)


def test_trainable_share_of_hyperformer() -> None:
    encoder, decoder = (HyperNet(D, TASKS, 6, positions, reduction=REDUCTION) for positions in (2, 3))
    numbers = count(encoder) + count(decoder) - decoder.task.numel()  # the official code has the tasks' vectors once
    assert sum(map(count, (*encoder.write, *decoder.write))) == 5 * 1_334_880 and numbers == 6_947_088
    trained = numbers + VISUAL + LAYER_NORMS
    assert round(100 * trained / (BART + VISUAL + numbers), 2) == pytest.approx(5.80, abs=0.011)


@pytest.mark.parametrize(("n", "rank"), [(1, 0), (2, 0), (4, 0), (2, 1), (4, 3)])
def test_count_of_kronecker_products(n: int, rank: int) -> None:
    i, o, copies = 24, 8, 3
    whole = n**3 + (rank * (i + o) if rank else i * o // n)
    assert count(PHM(copies, i, o, n, rank)) == copies * (whole + o)
    assert count(PHM(copies, i, o, n, rank, Rule(n))) == n**3 + copies * (whole - n**3 + o)


# -- Kronecker products


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 4), i=st.integers(1, 3), o=st.integers(1, 3), rank=st.integers(0, 2))
def test_phm_is_the_sum_of_kronecker_products(n: int, i: int, o: int, rank: int) -> None:
    A = torch.randn(n, n, n, dtype=F64)
    if rank:
        s, t = torch.randn(n, i, rank, dtype=F64), torch.randn(n, rank, o, dtype=F64)
        B = s @ t
        products = [naive.product(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True)]
        assert_close(B, torch.tensor(products, dtype=F64))
    else:
        B = torch.randn(n, i, o, dtype=F64)
    W = phm_weight(A, B)
    assert_close(W, torch.tensor(naive.kron_sum(A.tolist(), B.tolist()), dtype=F64))
    assert_close(W, sum(torch.kron(a, b) for a, b in zip(A, B, strict=True)))
    x = torch.randn(2, 3, n * i, dtype=F64)
    assert_close(phm_linear(x, A, B), x @ W)
    assert_close(phm_linear(x[0, 0], A, B), x[0, 0] @ W)
    assert phm_linear(x[:0], A, B).shape == (0, 3, n * o)


def test_phm_in_a_stack_and_its_special_cases() -> None:
    A, B = torch.randn(3, 2, 2, 2, dtype=F64), torch.randn(3, 2, 4, 5, dtype=F64)
    assert_close(phm_weight(A, B), torch.stack([phm_weight(a, b) for a, b in zip(A, B, strict=True)]))
    assert_close(phm_weight(A[0], B), torch.stack([phm_weight(A[0], b) for b in B]))  # a shared rule
    W = torch.randn(1, 6, 4, dtype=F64)
    assert_close(phm_weight(torch.full((1, 1, 1), 2.5, dtype=F64), W), 2.5 * W[0])  # n = 1: scaled by one number
    # complex numbers: x -> x w, with real and imaginary parts one after the other
    A = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [-1, 0]]], dtype=F64)
    x, w = torch.randn(5, 3, dtype=torch.complex128), torch.randn(3, 2, dtype=torch.complex128)
    y = phm_linear(torch.cat([x.real, x.imag], -1), A, torch.stack([w.real, w.imag]))
    assert_close(y, torch.cat([(x @ w).real, (x @ w).imag], -1))


def test_gradcheck_of_both_products() -> None:
    A, B, x = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((2, 2, 2), (2, 3, 2), (4, 6)))
    assert torch.autograd.gradcheck(phm_linear, (x, A, B)) and torch.autograd.gradcheck(phm_weight, (A, B))


def published_phm(A: Tensor, B: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """The arithmetic of the official package: an einsum and a view, then the bias."""
    H = torch.einsum("bac,bkp->bakcp", A, B).reshape(len(A), A.shape[1] * B.shape[1], A.shape[2] * B.shape[2]).sum(0)
    return torch.matmul(x, H) + bias


@pytest.mark.parametrize("rank", [0, 2])
def test_an_adapter_of_products_is_the_published_one(rank: int) -> None:
    model, tasks = made("multiple", d=8, phm=2, rank=rank)
    adapter, h = adapters(model)["0"], torch.randn(3, 5, 8, dtype=F64)

    def half(module: PHM, t: int, x: Tensor) -> Tensor:
        B = module.left[t] @ module.right[t] if rank else module.right[t]
        return published_phm(module.rule.A[t], B, x, module.bias[t])

    for t, name in enumerate(NAMES):
        z = half(adapter.down, t, h)
        gelu = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
        tasks.use(name)
        assert_close(adapter(h, h, view(model[0].base_layer)), half(adapter.up, t, gelu))


def test_a_batch_of_one_task_builds_that_matrix_alone() -> None:
    phm = PHM(3, 6, 4, 2, rank=1)
    W, b = phm()
    for t in range(3):
        one, bias = phm(t)
        assert one.shape == (1, 4, 6) and torch.equal(bias[0], b[t])
        assert_close(one[0], W[t])
    shared = PHM(1, 6, 4, 2)
    assert torch.equal(shared(2)[0], shared()[0])  # task 2 of a shared half is the half


def test_start_of_the_products() -> None:
    torch.manual_seed(0)
    assert Rule(8).A.std().item() == pytest.approx(0.01, rel=0.15)
    assert Rule(8, std=1e-4).A.std().item() == pytest.approx(1e-4, rel=0.15)
    phm, thin = PHM(1, 64, 64, 2), PHM(1, 64, 64, 2, rank=4)
    for p, sizes in ((phm.right, (32, 32)), (thin.left, (32, 4)), (thin.right, (4, 32))):
        slices = [nn.init.xavier_uniform_(torch.empty(sizes), gain=2**0.5) for _ in range(40)]
        assert_close(p.std(), torch.stack(slices).std(), rtol=0.15, atol=0)
        assert p.abs().max() <= torch.stack(slices).abs().max() * 1.05
    assert not PHM(2, 4, 4, 2, zero=True).right.any() and not PHM(2, 4, 4, 2, rank=1, zero=True)()[0].any()


def test_a_tiny_rule_kills_the_gradients() -> None:
    """With 1e-4 (the configuration file) instead of 1e-2 (the command line) the factors' gradients all but vanish."""
    sizes = {}
    for std in (1e-2, 1e-4):
        torch.manual_seed(0)
        phm = PHM(1, 16, 8, 2, rule=Rule(2, std=std))
        (phm()[0] @ torch.ones(16)).sum().backward()
        sizes[std] = phm.right.grad.norm().item()
    assert sizes[1e-4] == pytest.approx(1e-2 * sizes[1e-2], rel=1e-3) and sizes[1e-2] > 0


# -- the hyper-network


def hyper(tasks: int = 3, init: str = "paper", **options) -> HyperNet:
    torch.manual_seed(0)
    sizes = {"d": 4, "layers": 2, "positions": 1, "reduction": 2, "p": 3, "dim": 5, "hidden": 6} | options
    return HyperNet(tasks=tasks, init=init, **sizes).to(F64)


def test_the_network_is_the_naive_one() -> None:
    one = hyper(positions=2)
    shake(one)
    first, second = one.mlp[0], one.mlp[2]
    for layer in range(2):
        for position in range(2):
            got, write = one(layer, position), one.write[position]
            for t in range(3):
                e = naive.point(
                    one.task[t].tolist(), one.layer[layer].tolist(), first.weight.tolist(), first.bias.tolist(),
                    second.weight.tolist(), second.bias.tolist(), one.norm.weight.tolist(), one.norm.bias.tolist(),
                )  # fmt: skip
                assert_close(one.embed(layer)[t], torch.tensor(e, dtype=F64))
                for part, rows, value in zip("DbUc", (2, 1, 4, 1), got, strict=True):
                    W = naive.written(write[part].weight.tolist(), write[part].bias.tolist(), e, rows)
                    assert_close(value[t], torch.tensor(W, dtype=F64).reshape(value[t].shape))
                for all_tasks, alone in zip(got, one(layer, position, one=t), strict=True):
                    assert_close(alone[0], all_tasks[t])


def published_hyper(one: HyperNet, layer: int, position: int, task: int) -> list[Tensor]:
    """As the official controller goes about it: one vector, four linear layers, views."""
    joint = torch.cat([one.task[task].view(1, -1), one.layer[layer].view(1, -1)], dim=0).view(-1)
    e = nn.functional.layer_norm(one.mlp(joint), (len(one.norm.weight),), one.norm.weight, one.norm.bias, 1e-6)
    write = one.write[position]
    down, up = write["D"](e).view(one.r, one.d), write["U"](e).view(one.d, one.r)
    return [down, write["b"](e).view(-1), up, write["c"](e).view(-1)]


def test_the_network_is_the_published_one() -> None:
    one = hyper()
    shake(one)
    for task in range(3):
        for ours, theirs in zip(one(1), published_hyper(one, 1, 0, task), strict=True):
            assert_close(ours[task], theirs)


def hosted(init: str = "paper") -> tuple[nn.Sequential, Tasks, HyperNet]:
    model, tasks, one = net(), Tasks(NAMES), hyper(init=init)
    inject(model, Hyperformer, ["0", "1"], tasks=tasks, hyper=one, per_layer=places(model, ["0", "1"]))
    return model, tasks, one


def test_adapters_that_it_writes_and_their_copies() -> None:
    model, tasks, one = hosted()
    shake(model)
    x, outputs = torch.randn(3, 2, 4, dtype=F64), []
    for which in (*NAMES, torch.tensor([2, 0, 2])):
        tasks.use(which)
        outputs.append(model(x))
    assert_close(outputs[3], torch.stack([outputs[2][0], outputs[0][1], outputs[2][2]]))
    assert not torch.allclose(outputs[0], outputs[1])
    written = {n: a.written(view(model.get_submodule(n).base_layer)) for n, a in adapters(model).items()}
    install(model, written, "written")
    for which, y in zip((*NAMES, torch.tensor([2, 0, 2])), outputs, strict=True):
        tasks.use(which)
        assert_close(model(x), y)
    assert not any(p is q for p in one.parameters() for q in written["0"].parameters())


def test_one_point_gives_one_adapter_everywhere() -> None:
    one = hyper()
    shake(one)
    with torch.no_grad():
        one.task.copy_(one.task[:1].expand_as(one.task))
    D0, _, U0, _ = one(0)
    D1, _, U1, _ = one(1)
    assert_close(D0[0], D0[2])  # tasks alike
    assert not torch.allclose(D0[0], D1[0])
    with torch.no_grad():
        one.layer.copy_(one.layer[:1].expand_as(one.layer))
    assert_close(one(0)[0], one(1)[0])  # and layers
    assert_close(one(0)[2], one(1)[2])
    with torch.no_grad():
        one.norm.weight.zero_()  # a constant e
    assert_close(one(0)[0][0], one(1)[0][1])
    assert U0.shape == U1.shape == (3, 4, 2)


def test_start_of_the_network() -> None:
    model, tasks, one = hosted("zero")
    tasks.use("gqa")
    x = torch.randn(5, 4, dtype=F64)
    assert torch.equal(model(x), net()(x))
    D, b, U, c = one(0)
    assert D.any() and not b[0].equal(D[0, 0]) and not U.any() and not c.any()
    assert all(t.any() for t in hyper()(0))  # the paper's
    wide = HyperNet(32, 2, 2, p=8, dim=64)
    for linear in (wide.mlp[0], wide.write[0]["D"]):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1) and not linear.bias.any()


def test_places() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.Linear(2, 2), nn.Linear(2, 2)

    model = nn.ModuleDict({"encoder": nn.ModuleList([Block() for _ in range(3)]), "head": nn.Linear(2, 2)})
    found = places(model, r"encoder\.[12]\.\w+")
    assert found == {
        "encoder.1.attn": {"layer": 0, "position": 0}, "encoder.1.mlp": {"layer": 0, "position": 1},
        "encoder.2.attn": {"layer": 1, "position": 0}, "encoder.2.mlp": {"layer": 1, "position": 1},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"targets: expected layers in numbered blocks, got \['head'\]"):
        places(model, ["head", "1.mlp"])


# -- files, copies, some of the tasks


def keys(model: nn.Module) -> list[str]:
    return [key.removeprefix("base_model.model.") for key in state(model)]


def test_what_is_shared_is_stored_once(tmp_path) -> None:
    model, tasks, rule = net(), Tasks(NAMES), Rule(2)
    inject(model, VLAdapter, ["0", "1"], reduction=2, sharing="half-down", phm=2, tasks=tasks, rule=rule)
    shake(model)
    assert sum("rule" in key for key in keys(model)) == 1  # of four matrices in two layers
    assert {key: tuple(t.shape) for key, t in state(model).items() if ".0." in key and "right" in key} == {
        "base_model.model.0.down.right": (1, 2, 2, 1), "base_model.model.0.up.right": (3, 2, 1, 2)
    }  # fmt: skip
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(t.numel() for t in state(model).values())
    save(model, tmp_path)
    other, again = net(), Rule(2)
    load(other, tmp_path, tasks=tasks, rule=again)
    tasks.use([*NAMES])
    x = torch.randn(3, 4, dtype=F64)
    assert torch.equal(other(x), model(x)) and torch.equal(again.A, rule.A)
    with pytest.raises(ValueError, match="missing: .*rule"):  # the file has one rule for all
        load(net(), tmp_path, tasks=tasks)


def test_the_network_is_stored_once(tmp_path) -> None:
    model, tasks, one = hosted()
    shake(model)
    assert len(keys(model)) == len(list(one.parameters())) and all(key.startswith("0.hyper") for key in keys(model))
    save(model, tmp_path)
    other, fresh = net(), hyper(init="zero")
    load(other, tmp_path, name="again", tasks=tasks, hyper=fresh)
    tasks.use("nlvr")
    x = torch.randn(3, 4, dtype=F64)
    assert torch.equal(other(x), model(x)) and torch.equal(fresh.task, one.task)
    spec = json.loads((tmp_path / "adapter_config.json").read_text())
    assert spec["per_layer"] == {"1": {"layer": 1}} or spec["per_layer"] == {"0": {"layer": 0}}


@pytest.mark.parametrize("kind", [VLAdapter, Hyperformer])
def test_a_file_knows_the_order_of_its_tasks(kind: type, tmp_path) -> None:
    options = {"sharing": "multiple"} if kind is VLAdapter else {}

    def extra() -> dict:
        return {} if kind is VLAdapter else {"hyper": hyper()}

    model = net()
    inject(model, kind, ["0"], tasks=Tasks(NAMES), **options, **extra())
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"tasks: expected those .* \['vqa', 'gqa', 'nlvr'\], got \['gqa', "):
        load(net(), tmp_path, tasks=Tasks(["gqa", "vqa", "nlvr"]), **extra())
    with pytest.raises(ValueError, match="tasks: expected a Tasks"):
        load(net(), tmp_path, **extra())
    assert load(net(), tmp_path, tasks=Tasks(NAMES), **extra()) == ["0"]


def test_a_single_adapter_needs_no_tasks(tmp_path) -> None:
    model = net()
    inject(model, VLAdapter, ["0"])
    shake(model)
    save(model, tmp_path)
    other = net()
    load(other, tmp_path)
    x = torch.randn(2, 4, dtype=F64)
    assert_close(other(x), model(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"phm": 2}, {"phm": 2, "rank": 1, "rule": Rule(2).to(F64)}])
@pytest.mark.parametrize("sharing", SHARING)
def test_some_of_the_tasks(sharing: str, options: dict) -> None:
    model, tasks = made(sharing, **options)
    before, few = copy.deepcopy(adapters(model)["0"].state_dict()), Tasks(["nlvr", "vqa"])
    x, outputs = torch.randn(3, 4, dtype=F64), {}
    for name in few.names:
        tasks.use(name)
        outputs[name] = model(x)
    install(model, {n: a.subset(few) for n, a in adapters(model).items()}, "few")
    for name in few.names:
        few.use(name)
        assert_close(model(x), outputs[name])
    own = {key: t for key, t in before.items() if len(t) == 3 and "rule" not in key or t.ndim == 4 and len(t) == 3}
    new = adapters(model, "few")["0"].state_dict()
    assert {key: len(new[key]) for key in own} == dict.fromkeys(own, 2)
    assert all(torch.equal(new[key], t) for key, t in before.items() if key not in own)  # shared halves as they were
    assert all(torch.equal(t, adapters(model)["0"].state_dict()[key]) for key, t in before.items())
    if sharing != "single":
        with pytest.raises(ValueError, match=r"tasks: expected some of \['vqa', 'gqa', 'nlvr'\], got \['pets'\]"):
            adapters(model)["0"].subset(Tasks(["pets", "vqa"]))


def test_a_copy_follows_the_same_tasks() -> None:
    model, tasks = made("multiple")
    x = torch.randn(3, 4, dtype=torch.float64)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for twin in (copy.deepcopy(model), averaged.module):
        assert adapters(twin)["0"].tasks is adapters(twin)["1"].tasks is tasks
        for name in NAMES:
            tasks.use(name)
            assert torch.equal(twin(x), model(x))


# -- what is refused


def test_tasks() -> None:
    tasks = Tasks(NAMES)
    assert len(tasks) == 3 and tasks.current is None and tasks.one is None
    tasks.use("gqa")
    assert tasks.one == 1
    tasks.use(["gqa", "vqa"])
    assert tasks.current.tolist() == [1, 0] and tasks.one is None
    for wrong in ("pets", ["vqa", "pets"], ["vqa", 1]):
        with pytest.raises(ValueError, match=r"which: expected some of \['vqa', 'gqa', 'nlvr'\], got"):
            tasks.use(wrong)
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1]), torch.tensor(1), torch.tensor([1.0])):
        with pytest.raises(ValueError, match=r"which: expected \(N,\) integers below 3"):
            tasks.use(wrong)
    assert tasks.current.tolist() == [1, 0]  # as it was
    for wrong in ([], ["a", "a"], "ab"):
        with pytest.raises(ValueError, match="names: expected a list of different names"):
            Tasks(wrong)
    assert Tasks(["one"]).one == 0


def test_a_task_must_be_chosen_and_fit_the_batch() -> None:
    model, tasks = made("multiple")
    x = torch.randn(3, 4, dtype=F64)
    with pytest.raises(ValueError, match=r"tasks: expected one of \['vqa', 'gqa', 'nlvr'\] to be chosen by use\(\)"):
        model(x)
    tasks.use(["vqa", "gqa"])
    with pytest.raises(ValueError, match=r"tasks: expected the task of each of the 2 elements .* got \(3, 4\)"):
        model(x)
    assert made("single")[0](x).shape == (3, 4)


@pytest.mark.parametrize("kind", [VLAdapter, Hyperformer])
@pytest.mark.parametrize("shape", [(3, 3, 4), (5, 3, 4), (1, 3, 4)])
def test_a_batch_along_the_second_axis(kind: type, shape: tuple[int, ...], tmp_path) -> None:
    """As many tokens as elements, in the layout (tokens, N, d): each element has its task, whatever its token."""
    options = {"sharing": "multiple", "reduction": 2} if kind is VLAdapter else {"hyper": hyper()}
    model, tasks, x = net(), Tasks(NAMES), torch.randn(*shape, dtype=F64)
    inject(model, kind, ["0"], tasks=tasks, batch_dim=1, **options)
    shake(model)
    alone = []
    for n, name in enumerate(("gqa", "vqa", "gqa")):
        tasks.use(name)
        alone.append(model(x[:, n]))
    tasks.use(["gqa", "vqa", "gqa"])
    assert_close(model(x), torch.stack(alone, 1))
    tasks.use("gqa")
    assert_close(model(x)[:, 0], alone[0])
    assert model(x[0, 0]).shape == alone[0][0].shape  # of one task, any shape
    tasks.use(["gqa", "vqa", "gqa"])
    with pytest.raises(ValueError, match=r"batch_dim: expected an axis before the last one of \(3, 4\), got 1"):
        model(x[0])
    with pytest.raises(ValueError, match="tasks: expected the task of each of the 3 elements"):
        model(x[:, :2])
    save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["batch_dim"] == 1
    if kind is Hyperformer:
        base = model[0].base_layer
        assert adapters(model)["0"].written(view(base, F64)).batch_dim == 1


def test_batch_dims_that_are_none() -> None:
    for wrong in (-1, True, 1.0, "1"):
        with pytest.raises(ValueError, match="batch_dim: expected an integer >= 0"):
            VLAdapter(view(nn.Linear(4, 4)), reduction=2, batch_dim=wrong)
    with pytest.raises(ValueError, match=r"batch_dim: expected an integer in \[0, 0\], got 1"):
        VLAdapter(view(nn.Conv2d(2, 4, 1)), reduction=2, batch_dim=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reduction": 0}, "reduction: expected a finite number > 0, got 0"),
        ({"reduction": float("nan")}, "reduction: expected a finite number > 0, got nan"),
        ({"sharing": "half"}, "sharing: expected one of .*, got 'half'"),
        ({"sharing": "multiple"}, "tasks: expected a Tasks, from which the adapter reads the task, got None"),
        ({"phm": 0}, "phm: expected an integer >= 1, got 0"),
        ({"phm": True}, "phm: expected an integer >= 1, got True"),
        ({"phm": 3}, "n: expected a divisor of both sizes, 4 and 2, got 3"),
        ({"rank": 1}, "phm: expected 2 or more for a rank or a rule, got 1"),
        ({"phm": 2, "rank": -1}, "rank: expected a positive integer, or 0 for whole matrices, got -1"),
        ({"phm": 2, "rule": Rule(4)}, r"rule: expected one of shape \(2, 2, 2\), got \(4, 4, 4\)"),
        ({"init": "random"}, "init: expected one of \\['zero', 'paper'\\], got 'random'"),
    ],
)
def test_bad_options_change_nothing(options: dict, said: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=said):
        inject(model, VLAdapter, ["0", "1"], **{"reduction": 2, **options})
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"d": 0}, "d: expected an integer >= 1, got 0"),
        ({"dim": 1.5}, "dim: expected an integer >= 1, got 1.5"),
        ({"p": 1}, r"p: expected an integer >= 2, got 1"),
        ({"reduction": -1}, "reduction: expected a finite number > 0, got -1"),
        ({"init": "none"}, "init: expected one of \\['zero', 'paper'\\], got 'none'"),
    ],
)
def test_bad_networks(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        hyper(**options)


def test_networks_that_do_not_fit() -> None:
    base, tasks = view(nn.Linear(4, 4)), Tasks(NAMES)
    with pytest.raises(ValueError, match="hyper: expected a HyperNet for 4 outputs, got None"):
        Hyperformer(base, tasks=tasks)
    with pytest.raises(ValueError, match="hyper: expected a HyperNet for 4 outputs, got one for 8"):
        Hyperformer(base, tasks=tasks, hyper=hyper(d=8))
    with pytest.raises(ValueError, match="hyper: expected one for 3 tasks, got one for 2"):
        Hyperformer(base, tasks=tasks, hyper=hyper(tasks=2))
    for place in ({"layer": 2}, {"position": 1}, {"layer": -1}):
        with pytest.raises(ValueError, match="layer, position: expected numbers below those of 2 layers and 1 pos"):
            Hyperformer(base, tasks=tasks, hyper=hyper(), **place)


def test_every_option_changes_the_output() -> None:
    x, seen = torch.randn(2, 8, dtype=F64), []
    for options in (
        {}, {"reduction": 4}, {"sharing": "multiple"}, {"sharing": "half-up"}, {"sharing": "half-down"},
        {"init": "paper"}, {"phm": 2}, {"phm": 4}, {"phm": 2, "rank": 1}, {"phm": 2, "rank": 2},
        {"phm": 2, "rule": Rule(2).to(F64)},
    ):  # fmt: skip
        model, tasks = net(8), Tasks(NAMES)
        torch.manual_seed(0)
        inject(model, VLAdapter, ["0"], tasks=tasks, **{"reduction": 2, **options})
        if options != {"init": "paper"}:
            shake(model)
        tasks.use("nlvr")
        seen.append(model(x))
    assert all(not torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_stack_starts_as_linear_does() -> None:
    torch.manual_seed(0)
    stack, linear = Stack(4, 100, 50, zero_bias=False), nn.Linear(100, 200)
    assert_close(stack.weight.std(), linear.weight.std(), rtol=0.05, atol=0)
    assert stack.weight.abs().max() <= 0.1 and stack.bias.abs().max() <= 0.1 and stack.bias.std() > 0.04
    zero = Stack(2, 3, 4, zero=True)
    assert not zero.weight.any() and not zero.bias.any() and zero()[0].shape == (2, 4, 3)


def test_building_changes_nothing() -> None:
    model = net()
    new = build(model, VLAdapter, ["0"], reduction=2)
    assert list(new) == ["0"] and type(model[0]) is nn.Linear
