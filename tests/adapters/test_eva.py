"""EVA: directions against exact and incremental PCA, ranks, what collecting leaves alone, and PEFT's own EVA."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, IncrementalPCA
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.activations import input_rows, record_inputs, run, shared_inputs, token_mask
from peftref.adapters.core.files import load, save
from peftref.adapters.core.host import Host
from peftref.adapters.core.injection import activate, adapters, inject, merge, unload
from peftref.adapters.core.spectra import Accumulator, Moments, Spectrum, absorb, agreement
from peftref.adapters.eva import collect, inject_eva, redistribute, start
from tests._naive import eva as naive

double = {"dtype": torch.float64}
exact = partial(assert_close, rtol=1e-9, atol=1e-9)


def cloud(n: int, i: int, seed: int = 0, decay: float = 0.7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows whose principal axes have well separated variances, in random directions, around a mean that is not 0."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(i, i, generator=g, **double)).Q
    scales = decay ** torch.arange(i, **double)
    x = torch.randn(n, i, generator=g, **double) * scales @ axes + torch.randn(i, generator=g, **double)
    return x.to(dtype)


def moments(batches, k: int, center: bool = True) -> Spectrum:
    found = Moments(center)
    for batch in batches:
        found.update(batch)
    return found.spectrum(k)


def stepwise(batches, k: int, **options) -> Spectrum:
    found = None
    for batch in batches:
        found = absorb(found, batch, k, **options)
    return found


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.double(), b.double())


# -- directions


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 6), i=st.integers(1, 4), center=st.booleans(), seed=st.integers(0, 99))
def test_equal_to_the_naive_form(n: int, i: int, center: bool, seed: int) -> None:
    x = cloud(n, i, seed)
    pairs = naive.eigen(naive.scatter(x.tolist(), center))
    values = torch.tensor([value for value, _ in pairs], **double)
    rank = min(n - center, i)
    for found in (moments(x.split(2), i, center), absorb(None, x, min(n, i), center=center)):
        k = len(found.singular)
        assert_close(found.singular**2, values[:k], rtol=1e-8, atol=1e-10 * float(values[0]))
        assert_close(found.total, float(values.sum()), rtol=1e-8, atol=1e-12)
        clear = [j for j in range(rank) if values[j] > 1e-6 * values[0]]
        axes = torch.tensor([pairs[j][1] for j in clear], **double)
        gaps = (values[:-1] - values[1:]) / values[0] if i > 1 else values
        if len(gaps) == 0 or gaps[:rank].min() > 1e-4:
            assert_close(found.components[clear], axes, rtol=1e-6, atol=1e-6)
    if center:
        exact(moments([x], i).ratio, torch.tensor(naive.ratios(x.tolist(), i), **double))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(8, 20), min_size=1, max_size=5), i=st.integers(7, 25), k=st.integers(1, 6))
def test_incremental_is_that_of_scikit_learn(sizes: list[int], i: int, k: int) -> None:
    batches = cloud(sum(sizes), i, decay=0.9).split(sizes)
    peer, found = IncrementalPCA(k), None
    for batch in batches:
        peer.partial_fit(batch.numpy())
        found = absorb(found, batch, k)
        for ours, theirs in (
            (found.components, peer.components_),  # signs too
            (found.singular, peer.singular_values_),
            (found.mean, peer.mean_),
            (found.ratio, peer.explained_variance_ratio_),
        ):
            exact(ours, torch.from_numpy(np.asarray(theirs)))
    assert found.count == peer.n_samples_seen_


def test_exact_whatever_the_batches_and_their_order() -> None:
    x = cloud(200, 12)
    peer = PCA(12).fit(x.numpy())
    for batches in ([x], x.split(7), x.flip(0).split(33), x[torch.randperm(200)].split(50)):
        found = moments(batches, 5)
        exact(found.components.abs(), torch.from_numpy(peer.components_[:5]).abs())
        exact(found.singular, torch.from_numpy(peer.singular_values_[:5]))
        exact(found.ratio, torch.from_numpy(peer.explained_variance_ratio_[:5]))
        exact(found.mean, x.mean(0))
    everything = stepwise(x.split(20), 12)  # nothing cut off: the incremental way is exact too
    exact(everything.components, moments([x], 12).components)
    exact(everything.singular, moments([x], 12).singular)


def test_cutting_loses_what_the_exact_way_keeps() -> None:
    """What falls out of one component, batch by batch, is missing in the end."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 40, 3, generator=g, **double) * torch.tensor([1.0, 0.9, 0.8], **double)
    one, full = stepwise(x.unbind(), 1), moments(x.unbind(), 1)
    assert full.singular[0] > one.singular[0] * (1 + 1e-3) and full.total == pytest.approx(one.total)


def test_twice_the_same_data_is_the_same_direction() -> None:
    x = cloud(60, 10)
    once, twice = moments([x], 4), moments([x, x], 4)
    exact(once.components, twice.components)
    exact(once.ratio, twice.ratio)
    exact(twice.singular, once.singular * math.sqrt(2))
    step, again = absorb(None, x, 10), stepwise([x, x], 10)
    exact(step.components[:4], again.components[:4])
    exact(start(twice, 4, whiten=True), start(once, 4, whiten=True) * 2**-0.25)  # whitened, A shrinks with the data


@pytest.mark.parametrize("lowrank", [False, True])
def test_an_approximation_comes_close_where_the_spectrum_falls(lowrank: bool) -> None:
    batches = cloud(600, 50, decay=0.85, dtype=torch.float32).split(60)
    found, sums = stepwise(batches, 12, lowrank=lowrank), moments(batches, 12)
    assert cosines(found.components[:6], sums.components[:6]).min() > 0.999
    assert_close(found.ratio[:6], sums.ratio[:6], rtol=2e-3, atol=0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = stepwise(batches, 12, lowrank=lowrank)
    assert torch.equal(again.components, found.components) and torch.equal(torch.get_rng_state(), state)
    assert_close(found.components @ found.components.T, torch.eye(12), rtol=0, atol=1e-5)


def test_a_large_mean_and_an_outlying_feature_do_not_drown_the_rest() -> None:
    x = cloud(400, 8)
    right = moments([x], 4)
    shifted = (x + 1000 * torch.ones(8, **double)).float()
    for found in (moments(shifted.split(100), 4), stepwise(shifted.split(100), 8)):
        assert cosines(found.components[:3], right.components[:3]).min() > 0.999
    loud = torch.cat([1e4 * torch.randn(400, 1, **double), x], 1)  # as in language models: one feature towers
    loud = (loud - loud.mean(0)).float()
    found, right = moments(loud.split(100), 4), moments([loud.double()], 4)
    assert cosines(found.components, right.components).min() > 0.999


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("loud", [5e3, 1e5])
@pytest.mark.parametrize("route", ["gram", "incremental", "lowrank"])
def test_a_loud_direction_along_no_axis(route: str, loud: float, center: bool) -> None:
    """Squared in float32, one direction 5000 times as long as the next would round all others away."""
    g = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=g, **double)).Q
    lengths = torch.cat([torch.tensor([loud], **double), 0.7 ** torch.arange(39, **double)])
    x = (torch.randn(900, 40, generator=g, **double) * lengths @ axes).float()
    rows = x.double() - (x.double().mean(0) if center else 0)
    right = torch.linalg.svd(rows, full_matrices=False)
    found = Accumulator(8, route=route, center=center)
    for batch in x.split(300):
        found.update(batch)
    spectrum = found.finish()
    assert spectrum.components.dtype == spectrum.singular.dtype == spectrum.mean.dtype == torch.float32
    near = cosines(spectrum.components[:6], right.Vh[:6]).abs()
    assert near.min() > (1 - 1e-6 if route == "gram" else 0.998)
    if route == "gram":
        assert_close(spectrum.singular.double(), right.S[:8], rtol=1e-4, atol=0)


def test_no_rows_have_no_spectrum() -> None:
    with pytest.raises(ValueError, match="rows: expected some before a spectrum, got none"):
        Moments().spectrum(2)
    for k in (0, True, 1.5):
        with pytest.raises(ValueError, match="k: expected an integer >= 1"):
            moments([torch.randn(4, 3)], k)


def test_uncentred_is_the_papers_text_and_keeps_the_mean() -> None:
    x = cloud(100, 6)
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    for found in (moments(x.split(30), 6, center=False), stepwise(x.split(30), 6, center=False)):
        exact(found.singular, s)
        exact(found.components.abs(), v.abs())
        assert not found.mean.any() and abs(found.total - float(x.square().sum())) < 1e-9
    assert not torch.allclose(moments([x], 1).components, found.components[:1], atol=1e-2)


def test_nothing_varies() -> None:
    x = torch.full((5, 3), 2.0)
    for found in (moments([x, x], 2), stepwise([x, x], 2)):
        assert found.ratio.tolist() == [0, 0] and found.components.isfinite().all()
        assert start(found, 2, whiten=True).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(i=st.integers(2, 8), r=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_other_directions_see_more(i: int, r: int, seed: int) -> None:
    """Ky Fan: tr(A S A^T) is largest for the leading eigenvectors; Eckart and Young: they rebuild X best."""
    x, r = cloud(30, i, seed), min(r, i)
    sigma, A = x.T @ x / 30, start(moments([x], r, center=False), r)
    other = torch.linalg.qr(torch.randn(i, r, generator=torch.Generator().manual_seed(seed), **double)).Q.T
    assert torch.trace(A @ sigma @ A.T) >= torch.trace(other @ sigma @ other.T) - 1e-10
    assert (x - x @ A.T @ A).norm() <= (x - x @ other.T @ other).norm() + 1e-10


def test_start_whitens_a_copy() -> None:
    found = moments([cloud(50, 6)], 4)
    kept = found.components.clone()
    plain, white = start(found, 3), start(found, 3, whiten=True)
    exact(plain, kept[:3])
    exact(white, kept[:3] / found.singular[:3].sqrt()[:, None])
    plain.zero_()
    assert torch.equal(found.components, kept)
    flat = Spectrum(torch.eye(2), torch.tensor([4.0, 0.0]), torch.zeros(2), 9, 16.0)
    assert start(flat, 2, whiten=True).isfinite().all() and start(flat, 0, whiten=True).shape == (0, 2)


@pytest.mark.parametrize("subspace", [False, True])
def test_agreement(subspace: bool) -> None:
    a, b = (stepwise([cloud(20, 6, seed)], 4) for seed in (0, 1))
    for r in (1, 3):
        naively = naive.agreement(a.components.tolist(), b.components.tolist(), r, subspace)
        assert agreement(a, b, r, subspace=subspace) == pytest.approx(naively)
        assert agreement(a, a, r, subspace=subspace) == pytest.approx(1)
    assert agreement(a, b, 0, subspace=subspace) in (0, 1)
    few = stepwise([cloud(2, 6)], 2)
    assert agreement(a, few, 3, subspace=subspace) == 0


# -- ranks

spectra = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.floats(0, 1), min_size=1, max_size=5).map(lambda xi: sorted(xi, reverse=True)),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(xi=spectra, budget=st.integers(0, 12))
def test_ranks_are_the_naive_ones(xi: dict[str, list[float]], budget: int) -> None:
    dealt = redistribute({n: torch.tensor(of, **double) for n, of in xi.items()}, budget)
    assert dealt == naive.redistribute(xi, budget) and list(dealt) == list(xi)
    assert sum(dealt.values()) == min(budget, sum(map(len, xi.values())))


def test_flat_spectra_get_more() -> None:
    flat, peaked = torch.full((6,), 0.15), torch.tensor([0.9, 0.05, 0.02, 0.01, 0.0, 0.0])
    dealt = redistribute({"q": flat, "k": flat, "up": peaked, "down": peaked}, 12)
    assert dealt == {"q": 6, "k": 4, "up": 1, "down": 1}


# -- collecting


class Attention(nn.Module):
    """q, k and v have one input; copied has an equal one that is another tensor."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v, self.copied, self.out = (nn.Linear(d, d) for _ in range(5))
        self.norm, self.drop, self.idle = nn.BatchNorm1d(d), nn.Dropout(0.5), nn.Linear(d, d)

    def forward(self, x: Tensor, attention_mask=None, labels=None) -> Tensor:  # (b, t, d)
        h = self.drop(self.norm(x.mT).mT)
        y = self.q(h) * self.k(h).tanh() + self.v(h) + self.copied(h.clone())
        return self.out(y)


NAMES = ["q", "k", "v", "copied", "out"]


def model(seed: int = 0, **options) -> Attention:
    torch.manual_seed(seed)
    return Attention(**options)


def data(n: int = 4, b: int = 5, t: int = 7, d: int = 6) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(b, t, d, generator=g) * torch.arange(1, d + 1) for _ in range(n)]


def seen_by(net: nn.Module, name: str, batches) -> list[Tensor]:
    found = []
    with record_inputs(net, {name: net.get_submodule(name)}, lambda n, x: found.append(x.flatten(0, -2).clone())):
        for batch in batches:
            run(net, batch)
    return found


def fingerprint(net: nn.Module) -> tuple:
    state = {n: t.clone() for n, t in net.state_dict(keep_vars=True).items()}
    flags = [(n, m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in net.named_modules()]
    return {n: t.tolist() for n, t in state.items()}, flags, [p.requires_grad for p in net.parameters()]


@pytest.mark.parametrize("route", ["auto", "gram", "incremental", "lowrank"])
def test_each_layer_gets_the_directions_of_its_input(route: str) -> None:
    net, batches = model(), data()
    found = collect(net, NAMES, iter(batches), r=2, rho=3.0, route=route, tau=1.0)  # k = 6: nothing is cut off
    assert list(found.spectra) == NAMES and found.batches == 4
    for name, spectrum in found.spectra.items():
        right = moments(seen_by(net, name, batches), 6)
        assert cosines(spectrum.components, right.components).min() > 0.999
        assert_close(spectrum.ratio, right.ratio, rtol=1e-3, atol=1e-5)
        assert spectrum.count == 4 * 35
    assert found.ranks == redistribute({n: s.ratio for n, s in found.spectra.items()}, 10)
    assert found.spectra["q"] is found.spectra["k"] is found.spectra["v"]
    assert found.spectra["copied"] is not found.spectra["q"]


def test_the_same_tensor_and_not_its_address() -> None:
    net = model()
    layers = {n: net.get_submodule(n) for n in [*NAMES, "idle"]}
    assert shared_inputs(net, layers, data()[0]) == [["q", "k", "v"], ["copied"], ["out"], ["idle"]]

    class Chain(nn.Sequential):  # each input is freed before the next is made, and may get its address
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x)
            return x

    chain = Chain(*(nn.Linear(4, 4) for _ in range(30)))
    assert shared_inputs(chain, dict(chain.named_children()), torch.randn(8, 4)) == [[str(j)] for j in range(30)]

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            y = self.a(x)
            x.relu_()  # the same object, other numbers
            return y + self.b(x) + self.c(x)

    net = InPlace()
    assert shared_inputs(net, dict(net.named_children()), torch.randn(2, 3)) == [["a"], ["b", "c"]]


def test_convolutions_share_where_they_read_alike() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
            self.c = nn.Conv2d(2, 3, 3, padding=0)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + nn.functional.pad(self.c(x), (1, 1, 1, 1))

    torch.manual_seed(0)
    net, x = Stem(), torch.randn(4, 2, 6, 6)
    found = collect(net, ["a", "b", "c"], [x], r=3)
    assert found.spectra["a"] is found.spectra["b"] is not found.spectra["c"]
    windows = nn.functional.unfold(x, 3, padding=1).mT.flatten(0, 1)
    right = moments([windows], 6)
    assert_close(found.spectra["a"].components, right.components, rtol=1e-4, atol=1e-4)
    before = net(x)
    inject_eva(net, found, ranks={"a": 2})
    assert torch.equal(net(x), before)
    assert_close(adapters(net)["a"].lora_A.weight.data, right.components[:2].view(2, 2, 3, 3), rtol=1e-4, atol=1e-4)


def test_a_layer_called_twice_counts_twice() -> None:
    layer = nn.Linear(3, 3)
    net, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(20, 3)
    found = collect(net, ["0"], [x], r=1)
    with torch.no_grad():
        right = moments([x, layer(x).tanh()], 2)
    assert found.spectra["0"].count == 40
    assert_close(found.spectra["0"].components, right.components, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", [None, "forward", "nan", "mask", "data", "unseen"])
def test_the_model_is_left_as_it_was(broken: str | None) -> None:
    net, batches, extra = model(), data(), {}
    net.norm.eval()  # frozen statistics in a model that trains: flags differ by module
    net.q.weight.requires_grad_(False)
    targets = NAMES + ["idle"] * (broken == "unseen")
    before, state = fingerprint(net), torch.get_rng_state()
    if broken == "forward":
        calls = itertools.count()

        def forward(m: nn.Module, batch: Tensor) -> Tensor:
            y = m(batch)
            if next(calls) == 2:
                raise RuntimeError("out of memory")
            return y

        extra["forward"] = forward
    if broken == "nan":
        batches[2][0, 0, 0] = float("nan")
    if broken == "mask":
        extra["mask"] = lambda batch: torch.ones(3, dtype=torch.bool)
    if broken == "data":
        batches = (batch if j < 2 else 1 / 0 for j, batch in enumerate(batches))
    errors = {
        "forward": (RuntimeError, "out of memory"),
        "data": (ZeroDivisionError, "division"),
        "nan": (ValueError, "batches: expected finite inputs of every layer, got NaN or infinity into q"),
        "mask": (ValueError, r"mask: expected one value for each row of the input, \(5, 7\) for q, got \(3,\)"),
        "unseen": (ValueError, r"targets: expected layers that the batches reach, got none for \['idle'\]"),
    }
    if broken:
        error, said = errors[broken]
        with pytest.raises(error, match=said):
            collect(net, targets, batches, r=2, **extra)
    else:
        collect(net, targets, batches, r=2)
    assert fingerprint(net) == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_tokens_that_do_not_count_are_left_out() -> None:
    net, x = model(), data(1)[0]
    attention, labels = torch.ones(5, 7, dtype=torch.long), torch.randint(0, 9, (5, 7))
    attention[:, 5:], labels[:, :2] = 0, -100
    batch = {"x": x, "attention_mask": attention, "labels": labels}
    h = seen_by(net, "q", [x])[0].view(5, 7, 6)
    cases = {
        "both": ({}, h[:, 2:5]),
        "labels do not matter": ({"mask": partial(token_mask, ignore=None)}, h[:, :5]),
        "no mask": ({"mask": None}, h),
        "own": ({"mask": lambda b: torch.arange(7).expand(5, 7) > 3}, h[:, 4:]),
    }
    for options, kept in cases.values():
        found = collect(net, ["q"], [batch], r=2, **options).spectra["q"]
        right = moments([kept.flatten(0, 1)], 4)
        assert found.count == right.count
        assert_close(found.components, right.components, rtol=1e-4, atol=1e-4)
    assert token_mask(x) is None and token_mask({"x": x}) is None
    assert token_mask({"labels": labels[:, 0]}) is None  # one label an image
    assert token_mask({"labels": labels}).sum() == 25 and token_mask({"labels": labels}, ignore=None) is None
    nothing = {**batch, "labels": torch.full_like(labels, -100)}
    assert collect(net, ["q"], [nothing, batch], r=2).spectra["q"].count == 15
    with pytest.raises(ValueError, match=r"got none for \['q'\]"):
        collect(net, ["q"], [nothing], r=2)


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 20, "vocab_size": 20}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, d_model=8)).eval()


@pytest.mark.parametrize("length", [3, 4, 5])  # the source has four: its mask fits the target's tokens in one case
@pytest.mark.parametrize(
    ("make", "targets", "crossed"),
    [(t5, ["q", "k", "v", "wi"], ["EncDecAttention.k", "EncDecAttention.v"]),
     (bart, ["q_proj", "v_proj", "fc1"], ["encoder_attn.v_proj"])],
)  # fmt: skip
def test_an_encoder_and_a_decoder_have_tokens_of_their_own(make, targets, crossed, length: int) -> None:
    net = make()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[5, 1, -100, -100, -100], [6, 7, 1, -100, -100]])[:, :length].contiguous()
    batch = {"input_ids": torch.tensor([[3, 4, 2, 2], [4, 5, 6, 1]]), "attention_mask": mask, "labels": labels}
    attended = (torch.arange(length) < 2).long().expand(2, -1)
    cases = {
        "labels": (batch, {}, labels != -100),
        "given": ({**batch, "decoder_attention_mask": attended}, {}, attended.bool() & (labels != -100)),
        "ignored": (
            {**batch, "decoder_attention_mask": attended}, {"mask": partial(token_mask, ignore=None)}, attended == 1
        ),
        "all": (batch, {"mask": None}, torch.ones_like(labels, dtype=torch.bool)),
    }  # fmt: skip
    for case, (inputs, options, of_decoder) in cases.items():
        found = collect(net, targets, [inputs], r=1, **options)
        for n, spectrum in found.spectra.items():
            kept = of_decoder if "decoder" in n and not n.endswith(tuple(crossed)) else mask.bool()
            if case == "all" and kept is not of_decoder:
                kept = torch.ones(2, 4, dtype=torch.bool)
            rows: list[Tensor] = []
            with record_inputs(net, {n: net.get_submodule(n)}, lambda _, x, rows=rows: rows.append(x.clone())):
                run(net, inputs)
            assert spectrum.count == int(kept.sum()), (case, n)
            assert_close(spectrum.mean, rows[0][kept].mean(0), rtol=1e-5, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_labels_that_are_not_of_tokens() -> None:
    source = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    several = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    for batch in (
        {"attention_mask": source, "labels": torch.ones(2, 3).long()},  # of another length
        {"attention_mask": source, "labels": several.float()},  # several labels each, as the loss wants them
        {"attention_mask": source, "labels": several, "decoder_input_ids": several},
        {"attention_mask": source, "labels": torch.ones(2).long()},
    ):
        assert torch.equal(token_mask(batch), source.bool())
    for other in ({"pixel_values": torch.rand(2, 3, 4, 4)}, {"x": torch.rand(2, 4)}, {"input_ids": source[:, :2]}):
        assert token_mask({**other, "labels": several}) is None
        assert token_mask({**other, "labels": several.float()}) is None
    for tokens in ({"inputs_embeds": torch.rand(2, 4, 3)}, {"input_ids": source}):
        assert torch.equal(token_mask({**tokens, "labels": several}, ignore=0), several.bool())
    net = nn.Sequential(nn.Linear(6, 4))
    found = collect(net, ["0"], [{"x": torch.randn(2, 6), "labels": several}], r=1, forward=lambda m, b: m(b["x"]))
    assert found.spectra["0"].count == 2


def test_batches_of_any_kind() -> None:
    net, x = model(), data(1)[0]
    right = collect(net, ["out"], [x], r=2).spectra["out"]
    for batch in ((x, torch.zeros(5)), [x], {"x": x}):
        assert torch.equal(collect(net, ["out"], [batch], r=2).spectra["out"].components, right.components)
    own = collect(net, ["out"], ["five"], r=2, forward=lambda m, b: m(x)).spectra["out"]
    assert torch.equal(own.components, right.components)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(5)), batch_size=2)
    assert collect(net, ["out"], loader, r=2).spectra["out"].count == 35


@pytest.mark.parametrize("route", ["incremental", "lowrank", "gram"])
def test_short_batches_wait_for_more(route: str) -> None:
    """PEFT skips a batch of fewer rows than components, for ever."""
    net, x = nn.Sequential(nn.Linear(12, 2)), cloud(24, 12, dtype=torch.float32)
    found = collect(net, ["0"], x.split(3), r=4, rho=2.0, route=route, tau=1.0).spectra["0"]
    right = moments([x], 8)
    assert found.count == 24 and cosines(found.components[:4], right.components[:4]).min() > 0.99
    few = collect(net, ["0"], [x[:5]], r=4, rho=2.0, route=route)  # fewer in all: as many directions as there are
    assert few.ranks["0"] == 4 and few.spectra["0"].count == 5
    assert cosines(few.spectra["0"].components[:4], moments([x[:5]], 4).components).min() > 0.999


def test_ranks_fit_the_layers() -> None:
    net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2))
    found = collect(net, ["0", "2"], torch.randn(4, 50, 3), r=8, rho=2.0)  # the first has 3 inputs
    assert found.spectra["0"].components.shape == (3, 3) and found.spectra["2"].components.shape == (16, 20)
    assert sum(found.ranks.values()) == 3 + 8
    uniform = collect(net, ["0", "2"], torch.randn(4, 50, 3), r=2, rho=1.0)
    assert uniform.ranks == {"0": 2, "2": 2}


def test_stops_when_all_rest_and_says_who_does_not() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x = cloud(4000, 6, decay=0.5, dtype=torch.float32)
    same = [x[:500]] * 9
    still = collect(net, ["0", "2"], same, r=2, route="incremental", tau=0.99)
    assert still.batches == 2 and still.unconverged == []  # two updates are needed, and the same batch is no news
    assert collect(net, ["0", "2"], same, r=2, tau=0.99).batches == 9  # sums do not watch
    never = collect(net, ["0", "2"], x.split(500), r=2, route="incremental", tau=1.0)
    assert never.batches == 8 and never.unconverged == ["0", "2"]
    assert collect(net, ["0", "2"], x.split(500), r=2, route="incremental", tau=0.0).batches == 2
    assert collect(net, ["0", "2"], x.split(500), r=2, max_batches=3).batches == 3


def test_equal_values_turn_for_ever_and_the_subspace_does_not() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 8, generator=g) * torch.tensor([3.0, 3, 3, 3, 0.1, 0.1, 0.1, 0.1])
    net, options = nn.Sequential(nn.Linear(8, 2)), {"r": 4, "rho": 1.0, "route": "incremental"}
    turning = collect(net, ["0"], x.split(200), **options)
    resting = collect(net, ["0"], x.split(200), subspace=True, **options)
    assert turning.batches > 2 * resting.batches and resting.batches <= 3 and resting.unconverged == []


def test_a_resting_layer_is_left_out_and_may_wake_up() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 1), nn.Linear(6, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    steady, wild = cloud(1200, 6, decay=0.3, dtype=torch.float32), torch.randn(1200, 6)
    batches = [{"x": x, "y": y} for x, y in zip(steady.split(100), wild.split(100), strict=True)]
    found = collect(Two(), ["a", "b"], batches, r=1, rho=2.0, route="incremental", tau=0.999)
    assert found.spectra["a"].count < found.spectra["b"].count and found.unconverged in ([], ["b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_wide_whatever_the_model(dtype: torch.dtype) -> None:
    net, batches = model().to(dtype), [x.to(dtype) for x in data()]
    wide = torch.promote_types(dtype, torch.float32)
    found = collect(net, NAMES, batches, r=2)
    for spectrum in found.spectra.values():
        assert spectrum.components.dtype == spectrum.singular.dtype == wide
        assert_close(spectrum.components @ spectrum.components.T, torch.eye(4, dtype=wide), rtol=0, atol=1e-5)
    assert inject_eva(net, found) and adapters(net)["q"].dtype == wide
    if dtype == torch.bfloat16:
        net = model()
        with torch.autocast("cpu", dtype):
            auto = collect(net, ["q"], data(), r=2).spectra["q"]
            assert torch.is_autocast_enabled("cpu")
        h = torch.cat(seen_by(net, "q", data()))
        assert_close(auto.components, moments([h], 4).components, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r: expected an integer >= 1, got 0"),
        ({"r": True}, "r: expected an integer >= 1, got True"),
        ({"rho": 0.5}, "rho: expected a finite number >= 1, got 0.5"),
        ({"rho": float("nan")}, "rho: expected a finite number >= 1, got nan"),
        ({"tau": 1.5}, r"tau: expected a finite number in \[0, 1\], got 1.5"),
        ({"max_batches": 0}, "max_batches: expected an integer >= 1, got 0"),
        ({"route": "svd"}, "route: expected one of .*, got 'svd'"),
        ({"targets": ["nothing"]}, "targets: expected names of layers"),
        ({"batches": []}, "batches: expected at least one, got none"),
    ],
)
def test_bad_options_are_named_before_anything_runs(options: dict, said: str) -> None:
    called = []
    arguments = {"targets": NAMES, "batches": data(), "forward": lambda *a: called.append(a), **options}
    with pytest.raises(ValueError, match=said):
        collect(model(), **arguments)
    assert not called


# -- LoRA with these directions


def test_starts_as_the_model_and_with_the_directions() -> None:
    net, x = model().eval().requires_grad_(False), data()[0]  # which kernel multiplies depends on who wants a gradient
    found, before = collect(net, NAMES, data(), r=2), net(data()[0])
    names = inject_eva(net, found, whiten=True, lora_alpha=6)
    assert names == [n for n in NAMES if found.ranks[n]] and torch.equal(net(x), before)
    for n, adapter in adapters(net).items():
        assert type(adapter) is LoRA and not adapter.lora_B.weight.any() and adapter.r == found.ranks[n]
        assert torch.equal(adapter.lora_A.weight.data, start(found.spectra[n], adapter.r, whiten=True))
        assert adapter.scale == pytest.approx(6 / 2)  # the same for every rank
        assert adapter.lora_A.weight.requires_grad and adapter.lora_B.weight.requires_grad
    addresses = {a.lora_A.weight.data_ptr() for a in adapters(net).values()}
    assert len(addresses) == len(names)  # no layer shares memory with another or with what was found
    unload(net)
    assert torch.equal(net(x), before) and not any(isinstance(m, Host) for m in net.modules())


def test_scales() -> None:
    found = collect(model(), NAMES, data(), r=2)
    given = {"q": 1, "k": 4, "out": 2}
    scales = {}
    for case, options in {"kept": {}, "not": {"adjust": False}, "rs": {"use_rslora": True}}.items():
        net = model()
        inject_eva(net, found, ranks=given, lora_alpha=3, **options)
        scales[case] = [a.scale for a in adapters(net).values()]
    assert scales["kept"] == pytest.approx([1.5, 1.5, 1.5])
    assert scales["not"] == pytest.approx([3, 0.75, 1.5])
    assert scales["rs"] == pytest.approx([3 / math.sqrt(2)] * 3)


def test_ranks_of_ones_own_and_what_is_refused() -> None:
    net = model()
    found = collect(net, NAMES, data(), r=2)
    before = fingerprint(net)
    refused = {
        "ranks: expected at most .* got {'nothing': 1}": {"ranks": {"nothing": 1}},
        "ranks: expected at most .* got {'q': 5}": {"ranks": {"q": 5}},
        "ranks: expected at most .* got {'k': -1}": {"ranks": {"k": -1}},
        "ranks: expected at least one layer with a rank above 0": {"ranks": dict.fromkeys(NAMES, 0)},
        "lora_dropout: expected": {"lora_dropout": 2.0},
        "name: expected": {"name": "a.b"},
    }
    for said, options in refused.items():
        with pytest.raises(ValueError, match=said):
            inject_eva(net, found, **options)
        assert fingerprint(net) == before
    assert inject_eva(net, found, ranks={"q": 1, "k": 0}, name="other", freeze=False) == ["q"]
    assert net.out.weight.requires_grad and adapters(net, "other")["q"].r == 1
    other = Attention(d=4)
    with pytest.raises((ValueError, RuntimeError)):
        inject_eva(other, found)  # of another width
    assert not any(isinstance(m, Host) for m in other.modules())


def test_beside_other_adapters() -> None:
    net, batches = model().eval(), data()
    inject(net, LoRA, ["q", "out"], name="first", r=2)
    nn.init.normal_(adapters(net, "first")["q"].lora_B.weight)
    active = collect(net, ["out"], batches, r=2).spectra["out"]
    activate(net)
    plain = collect(net, ["out"], batches, r=2).spectra["out"]
    assert not torch.allclose(active.components, plain.components, atol=1e-3)  # what is active takes part
    untouched = collect(model(), ["out"], batches, r=2).spectra["out"]
    assert_close(plain.components, untouched.components, rtol=1e-4, atol=1e-4)
    shared = collect(net, NAMES, batches, r=2)
    assert shared.spectra["q"] is shared.spectra["k"]
    assert inject_eva(net, shared, name="second")
    merge(net)
    with pytest.raises(RuntimeError, match="unmerge it first"):
        inject_eva(net, shared, name="third")


def test_the_first_gradient() -> None:
    """grad B = s G^T X A^T; if g knows nothing of x, the mean of its square is tr(A Sigma A^T), times constants."""
    torch.manual_seed(0)
    net, x, g = nn.Sequential(nn.Linear(5, 4)).double(), cloud(40, 5), torch.randn(40, 4, **double)
    found = collect(net, ["0"], [x], r=2, rho=2.0, center=False)
    inject_eva(net, found, ranks={"0": 2}, lora_alpha=6)
    net(x).backward(g)
    adapter = adapters(net)["0"]
    A = adapter.lora_A.weight.detach()
    exact(adapter.lora_B.weight.grad, 3 * g.T @ x @ A.T)
    assert not adapter.lora_A.weight.grad.any()
    squares = [(3 * torch.randn(40, 4, **double).T @ x @ A.T).square().sum() for _ in range(4000)]
    expected = 9 * 4 * torch.trace(A @ x.T @ x @ A.T)
    assert torch.stack(squares).mean() == pytest.approx(float(expected), rel=0.05)


def test_learns_faster_than_from_random_orthonormal_directions() -> None:
    x = cloud(300, 40, decay=0.8, dtype=torch.float32)
    x = x - x.mean(0)
    target = x @ torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def loss_of(eva: bool, seed: int) -> float:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(40, 3, bias=False))
        nn.init.zeros_(net[0].weight)
        inject_eva(net, collect(net, ["0"], [x], r=2, rho=1.0), lora_alpha=2)
        A = adapters(net)["0"].lora_A.weight
        A.data = A.data if eva else torch.linalg.qr(torch.randn(40, 2)).Q.T.contiguous()
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=3e-2)
        for _ in range(30):
            loss = (net(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert loss_of(True, 0) < 0.7 * min(loss_of(False, seed) for seed in range(5))


def test_everything_that_can_be_set_matters() -> None:
    """tau and subspace: above; what inject_eva can be told: above too."""
    net, batches = model(), [{"x": x, "labels": torch.arange(7).expand(5, 7) * 50 - 100} for x in data()]
    base = {"r": 2, "route": "incremental"}

    def look(**options) -> tuple:
        options = {**base, **options}
        found = collect(net, options.pop("targets", NAMES), batches, **options)
        top = found.spectra["out"].components
        return found.batches, sorted(found.ranks.items()), [round(v, 3) for v in top.flatten().tolist()]

    plain = look()
    for options in (
        {"r": 1}, {"rho": 1.0}, {"exclude": ["q"]}, {"max_batches": 1}, {"route": "gram"}, {"center": False},
        {"mask": None}, {"forward": lambda m, b: m(2 * b["x"] + 1)}, {"targets": ["out"]},
    ):  # fmt: skip
        assert look(**options) != plain, options


def test_inputs_given_by_keyword_are_seen() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=x)

    x = torch.randn(9, 3)
    assert torch.equal(collect(Keyword(), ["a"], [x], r=1).spectra["a"].mean, moments([x], 1).mean)


def test_reading_rows() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(2, 4, 3)
    assert torch.equal(input_rows("a", layer, x), x.flatten(0, 1))
    assert torch.equal(input_rows("a", layer, x[0, 0]), x[0, :1])
    assert input_rows("a", layer, x[:0]).shape == (0, 3) and input_rows("a", layer, x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="NaN or infinity into block.a"):
        input_rows("block.a", layer, torch.tensor([[1.0, float("inf"), 0.0]]))


# -- PEFT's


peft = pytest.importorskip("peft")
quiet = pytest.mark.filterwarnings("ignore")


def flat(x, batch, name) -> Tensor:
    x = x if isinstance(x, Tensor) else x[0]
    return x.flatten(0, -2)


def theirs(net: nn.Module, batches, r: int = 2, **config):
    eva = peft.EvaConfig(**config)
    options = peft.LoraConfig(r=r, target_modules=NAMES, init_lora_weights="eva", eva_config=eva)
    passes = itertools.count()
    found = peft.get_eva_state_dict(
        net, batches, options, forward_fn=lambda m, b: (next(passes), m(b)), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=flat, show_progress_bar=False,
    )  # fmt: skip
    return found, next(passes) - 1  # one pass is for the hashes


class Wide(nn.Module):
    """Inputs with falling spectra, each of its own; a and b have the same."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.q, self.k, self.v, self.copied, self.out = (nn.Linear(d, d) for _ in range(5))
        for layer, decay in zip((self.q, self.k, self.v, self.copied), (0.3, 0.3, 0.75, 0.9), strict=True):
            layer.weight.data *= decay ** torch.arange(d)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        h = self.q(x) + self.k(x)
        return self.out(self.copied(self.v(h)))


@quiet
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_the_directions_and_ranks_are_those_of_peft(rho: float) -> None:
    torch.manual_seed(0)
    net, batches = Wide(), [x.view(3, 100, 24) for x in cloud(3000, 24, decay=0.8, dtype=torch.float32).split(300)]
    right, passes = theirs(net, batches, r=3, rho=rho)
    seen = list(itertools.islice(itertools.cycle(batches), passes))  # PEFT goes round until all rest
    for route in ("incremental", "lowrank", "gram"):
        found = collect(net, NAMES, seen, r=3, rho=rho, route=route)
        # layers with one input have equal ratios, and PEFT's sort is not stable: which of them comes first is chance
        assert sorted(found.ranks[n] for n in ("q", "k")) == sorted(len(right[n]) for n in ("q", "k"))
        for n, A in right.items():
            assert n in ("q", "k") or found.ranks[n] == len(A), route
            # sums go on where PEFT rests
            assert cosines(found.spectra[n].components[: len(A)], A).min() > (0.99 if route == "gram" else 0.999)
        if route != "gram":
            assert found.batches == passes and found.unconverged == []


@quiet
def test_peft_whitens_layers_of_one_input_several_times_and_we_once() -> None:
    torch.manual_seed(0)
    net, batches = Wide(), list(cloud(3000, 24, decay=0.8, dtype=torch.float32).split(300))
    plain, _ = theirs(net, batches, r=3, rho=1.0)
    white, passes = theirs(net, batches, r=3, rho=1.0, whiten=True)
    found = collect(net, NAMES, itertools.islice(itertools.cycle(batches), passes), r=3, rho=1.0, route="incremental")
    assert white["q"].data_ptr() == white["k"].data_ptr()  # one tensor, divided in place for each of its layers
    root = found.spectra["q"].singular.sqrt()
    for n in NAMES:
        ours = start(found.spectra[n], 3, whiten=True)
        once = (1 / found.spectra[n].singular).sqrt()
        white[n], plain[n] = white[n].float(), plain[n].float()
        assert_close(ours.norm(dim=1), once, rtol=1e-5, atol=0)
        if n not in ("q", "k"):
            assert_close(white[n], plain[n] * once[:, None], rtol=1e-3, atol=1e-5)
            assert cosines(ours, white[n]).min() > 0.999
    for n in ("q", "k"):
        assert_close(white[n].norm(dim=1), 1 / root**2, rtol=1e-2, atol=0)
    assert (1 / root**2 < 0.5 / root).all()


@quiet
def test_the_file_is_a_lora_for_peft_with_its_ranks(tmp_path) -> None:
    torch.manual_seed(0)
    net, x = Wide(), cloud(200, 24, dtype=torch.float32)
    found = collect(net, NAMES, [x], r=2)
    given = {"q": 4, "k": 0, "v": 1, "copied": 2, "out": 3}
    names = inject_eva(net, found, ranks=given, lora_alpha=3)
    for adapter in adapters(net).values():
        nn.init.normal_(adapter.lora_B.weight)
    y = net(x)
    save(net, tmp_path)
    spec = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted({spec["r"], *spec["rank_pattern"].values()}) == [1, 2, 3, 4] and len(spec["rank_pattern"]) == 3
    assert {spec["lora_alpha"], *spec["alpha_pattern"].values()} == {1.5, 3, 4.5, 6}
    assert sorted(spec["target_modules"]) == sorted(names) == ["copied", "out", "q", "v"]  # no k
    torch.manual_seed(0)
    other = peft.PeftModel.from_pretrained(Wide(), tmp_path).eval()
    assert_close(other(x), y, rtol=1e-5, atol=1e-5)
    assert {n: m.r["default"] for n, m in other.base_model.model.named_children() if hasattr(m, "r")} == {
        n: q for n, q in given.items() if q
    }
    torch.manual_seed(0)
    again = Wide()
    load(again, tmp_path)
    assert torch.equal(again(x), y)


@quiet
def test_what_peft_started_and_saved_opens_here(tmp_path) -> None:
    torch.manual_seed(0)
    net, batches = Wide(), list(cloud(3000, 24, decay=0.8, dtype=torch.float32).split(300))
    options = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=NAMES, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
    )
    model = peft.get_peft_model(net, options)
    peft.initialize_lora_eva_weights(
        model, batches, forward_fn=lambda m, b: m(b), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=flat,
        show_progress_bar=False,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data = torch.randn(p.shape, generator=g)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = Wide()
    names = load(ours, tmp_path)
    assert_close(ours(batches[0]), model(batches[0]), rtol=1e-5, atol=1e-5)
    sizes = {n: a.r for n, a in adapters(ours).items()}
    assert sum(sizes.values()) == 15 and len(set(sizes.values())) > 1
    assert [a.scale for a in adapters(ours).values()] == pytest.approx([4 / 3] * len(names))


@quiet
def test_padding_and_labels_of_a_language_model_as_in_peft() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    net = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **config))
    g = torch.Generator().manual_seed(0)
    net.model.embed_tokens.weight.data *= 30 * 0.6 ** torch.arange(16)
    for layer in net.model.layers:
        layer.mlp.gate_proj.weight.data *= 30 * 0.6 ** torch.arange(24)[:, None]
    batches = []
    for _ in range(4):
        tokens, attention = torch.randint(1, 50, (8, 20), generator=g), torch.ones(8, 20, dtype=torch.long)
        attention[:4, 15:] = 0
        labels = torch.where(torch.rand(8, 20, generator=g) < 0.3, -100, tokens)
        batches.append({"input_ids": tokens, "attention_mask": attention, "labels": labels})
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    options = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.9)
    )
    passes = itertools.count()
    right = peft.get_eva_state_dict(
        net, batches, options, forward_fn=lambda m, b: (next(passes), m(**b)), show_progress_bar=False
    )
    seen = itertools.islice(itertools.cycle(batches), next(passes) - 1)
    found = collect(net, targets, seen, r=2, rho=1.0, tau=0.9, route="incremental")
    assert set(found.spectra) == set(right) and len(found.spectra) == 8
    for n, A in right.items():
        assert cosines(found.spectra[n].components, A).min() > 0.995, n
    one = "model.layers.1.self_attn."
    assert found.spectra[one + "q_proj"] is found.spectra[one + "k_proj"] is found.spectra[one + "v_proj"]
