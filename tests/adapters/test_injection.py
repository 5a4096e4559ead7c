"""Finding layers, naming, switching, nesting, and every refusal: the model is as it was after each."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.adapter import Adapter
from peftref.adapters.core.bypass import bypassed
from peftref.adapters.core.host import Host
from peftref.adapters.core.injection import activate, adapters, build, inject, install, merge, unload, unmerge
from peftref.adapters.core.layers import Layer, refusal, view
from peftref.adapters.core.targets import find, modules_by_name
from peftref.adapters.eva import collect
from peftref.models import SmallCNN


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.q_proj(x) * self.v_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Beside(Adapter):
    """Of a whole block; not linear."""

    kind, any_module, mergeable = "test_beside", True, False

    def __init__(self, base: Layer, width: int = 4) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return self.gain * torch.tanh(x)


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def look(net: nn.Module) -> tuple:
    """All that a refused call could have changed."""
    flags = [(n, p.requires_grad, p.detach().clone().tolist()) for n, p in net.named_parameters()]
    states = [(n, h.active, h.merged) for n, h in modules_by_name(net).items() if isinstance(h, Host)]
    return flags, copy.deepcopy(states), [(n, type(m).__name__, m.training) for n, m in net.named_modules()]


def fill(net: nn.Module, name: str = "default") -> None:
    with torch.no_grad():
        for adapter in adapters(net, name).values():
            for p in adapter.parameters():
                p.normal_()


# -- which layers


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_proj"], (), ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (["blocks.1.q_proj", "head"], (), ["blocks.1.q_proj", "head"]),
        (r"blocks\.0\.[qv]_proj", (), ["blocks.0.q_proj", "blocks.0.v_proj"]),
        (["mlp.0", "q_proj"], ["blocks.0.q_proj", "mlp.0"], ["blocks.1.q_proj"]),
        ("all-linear", r"blocks\.0\..*|.*mlp.*", ["blocks.1.q_proj", "blocks.1.v_proj", "head"]),
        (("head",), r"blocks.*", ["head"]),
        (iter(["head"]), iter(["q_proj"]), ["head"]),
        ({"head"}, [], ["head"]),
        (["_proj"], [], None),  # an end of a name begins after a dot
        (["q"], [], None),
        ("q_proj", [], None),  # a regular expression is for the whole name
        ([], [], None),
        (["head"], "all-linear", None),
    ],
)
def test_targets(targets, exclude, expected) -> None:
    net = model()
    if expected is None:
        with pytest.raises(
            ValueError, match=r"names of layers, of which there are \['blocks.0.q_proj',.*and 1 more, got"
        ):
            inject(net, LoRA, targets, exclude=exclude)
    else:
        assert inject(net, LoRA, targets, exclude=exclude) == expected
        assert list(adapters(net)) == expected == [n for n, m in net.named_modules() if isinstance(m, Host)]


def test_names_do_not_change_when_adapters_come() -> None:
    net = model()
    before = list(modules_by_name(net))
    inject(net, Beside, ["mlp"], name="block")
    inject(net, LoRA, "all-linear", name="inside")
    assert list(modules_by_name(net)) == before
    assert list(find(net, ["mlp.0"])) == ["blocks.0.mlp.0", "blocks.1.mlp.0"]
    assert list(adapters(net, "inside"))[2:4] == ["blocks.0.mlp.0", "blocks.0.mlp.2"]


def test_per_layer_options_and_layers_left_alone() -> None:
    net = model()
    own = {"blocks.0.q_proj": {"r": 3, "lora_alpha": 1}, "blocks.1.v_proj": None}
    assert inject(net, LoRA, ["q_proj", "v_proj"], r=2, per_layer=own) == [
        "blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj",
    ]  # fmt: skip
    assert {n: (a.r, a.lora_alpha, a.lora_A.weight.shape[0]) for n, a in adapters(net).items()} == {
        "blocks.0.q_proj": (3, 1, 3), "blocks.0.v_proj": (2, 8, 2), "blocks.1.q_proj": (2, 8, 2),
    }  # fmt: skip


def test_built_first_changed_then_installed() -> None:
    net, x = model(), torch.randn(2, 4)
    before, y = look(net), net(x)
    new = build(net, LoRA, ["head"], r=1)
    with torch.no_grad():
        new["head"].lora_B.weight.fill_(1.0)
    assert look(net) == before
    install(net, new, "mine")
    assert adapters(net, "mine")["head"] is new["head"] and not torch.equal(net(x), y)


def test_whatever_the_model_gives_it_a_layer_in_several_places_is_one() -> None:
    net = model()
    net.blocks[1].q_proj = net.blocks[0].v_proj
    net.blocks.append(net.blocks[0])
    assert inject(net, LoRA, [r"blocks.1.q_proj", "head"]) == ["blocks.0.v_proj", "head"]
    assert net.blocks[1].q_proj is net.blocks[0].v_proj and net.blocks[2] is net.blocks[0]
    fill(net)
    x = torch.randn(3, 4)
    y = net(x)
    merge(net)
    assert_close(net(x), y, rtol=1e-4, atol=1e-4)
    unmerge(net)
    assert torch.equal(net(x), y)


# -- several adapters


def test_the_newest_is_used_and_trained_until_another_is_chosen() -> None:
    net, x = model(), torch.randn(3, 4)
    outputs = {(): net(x)}
    for name, targets in (("one", ["q_proj"]), ("two", ["q_proj", "head"])):
        inject(net, LoRA, targets, name=name)
        fill(net, name)
        outputs[(name,)] = net(x)
    for names, trained in (((), 0), (("one",), 4), (("two",), 6), (("one", "two"), 10), (("two", "one", "one"), 10)):
        activate(net, *names)
        grads = [n for n, p in net.named_parameters() if p.requires_grad]
        assert len(grads) == trained and all(n.split(".adapters.")[1].split(".")[0] in names for n in grads)
        if names in outputs:
            assert torch.equal(net(x), outputs[names])
        else:
            assert not any(torch.allclose(net(x), y) for y in outputs.values())


def test_a_head_can_be_trained_too() -> None:
    net = model()
    inject(net, LoRA, ["q_proj"], name="one")
    net.head.requires_grad_(True)
    inject(net, LoRA, ["v_proj"], name="two", freeze=False)
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert trained[-2:] == ["head.weight", "head.bias"] and len(trained) == 6
    inject(net, LoRA, ["head"], name="three")
    assert not net.head.base_layer.weight.requires_grad


def test_inside_a_block_that_has_an_adapter() -> None:
    for order in ((Beside, LoRA), (LoRA, Beside)):
        net, x = model(), torch.randn(3, 4)
        y, modules = net(x), dict(net.named_modules())
        for kind in order:
            inject(net, kind, ["mlp"] if kind is Beside else ["mlp.2"], name=kind.kind)
            fill(net, kind.kind)
        activate(net)
        assert torch.equal(net(x), y)
        activate(net, "lora", "test_beside")
        assert len([p for p in net.parameters() if p.requires_grad]) == 2 * 2 + 2
        both = net(x)
        assert not torch.allclose(both, y)
        activate(net, "lora")
        merge(net)
        assert not torch.equal(net(x), y)
        unload(net)
        assert torch.equal(net(x), y) and dict(net.named_modules()) == modules


def test_sharing_one_bank_between_layers() -> None:
    class Shared(Beside):
        kind = "test_shared"

        def __init__(self, base: Layer, bank: nn.Parameter) -> None:
            super().__init__(base)
            self.bank = bank

    net, bank = model(), nn.Parameter(torch.ones(4))
    inject(net, Shared, ["mlp"], bank=bank)
    assert [a.bank is bank for a in adapters(net).values()] == [True, True]
    assert len([p for p in net.parameters() if p.requires_grad]) == 3


# -- the host


def test_the_host_answers_for_the_frozen_layer() -> None:
    net = model()
    inject(net, LoRA, ["head"])
    head = net.head
    assert head.in_features == 4 and head.weight is head.base_layer.weight and head.bias.shape == (3,)
    assert "active=['default'], merged=False" in repr(head)
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'nothing'"):
        _ = head.nothing
    assert not hasattr(Host.__new__(Host), "weight")  # as copying and unpickling ask


def test_a_state_dict_taken_while_merged_is_not_changed_by_unmerging() -> None:
    net = model()
    inject(net, LoRA, ["head"])
    fill(net)
    merge(net)
    taken = net.state_dict()["head.base_layer.weight"]
    kept = taken.clone()
    unmerge(net)
    assert torch.equal(taken, kept) and not torch.equal(taken, net.head.weight)


def test_training_flags_stay() -> None:
    net = model().train()
    net.blocks[0].eval()
    inject(net, LoRA, ["q_proj"])
    assert not any(m.training for m in net.blocks[0].modules())
    assert all(m.training for m in net.blocks[1].modules()) and net.training


def test_half_precision_merges_overflow_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2)).half()
    inject(net, LoRA, ["0"])
    with torch.no_grad():
        adapters(net)["0"].lora_B.weight.fill_(1e6)
        adapters(net)["0"].lora_A.weight.fill_(1.0)
    before = look(net)
    with pytest.raises(ValueError, match="finite merged weights"):
        merge(net)
    assert look(net) == before


# -- refusals


class Reads(nn.Module):
    """Calls one layer, and uses the weight of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.used, self.asked, self.passed = (nn.Linear(2, 2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x).to(self.asked.weight.dtype)
        if isinstance(self.asked.weight, Tensor):
            x = self.asked(x)
        return nn.functional.linear(x @ self.used.weight, weight=self.passed.weight.float())


def test_layers_whose_weights_are_used_without_a_call() -> None:
    assert bypassed(nn.MultiheadAttention) == {"out_proj"}
    assert {"linear1", "linear2"} <= bypassed(nn.TransformerEncoderLayer)
    assert bypassed(Reads) == {"used", "passed"}
    cases = [
        (
            nn.MultiheadAttention(4, 2),
            ["out_proj"],
            r"out_proj \(in a MultiheadAttention\), whose weights are used without",
        ),
        (nn.TransformerEncoderLayer(4, 2, 8), ["linear2"], r"linear2 \(in a TransformerEncoderLayer\), whose"),
        (
            nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)),
            "all-linear",
            r"got 0.linear1 .*, 0.linear2 .*, 0.self_attn.out_proj \(in a Multi",
        ),
        (WindowAttention(8, (2, 2), 2), ["qkv"], r"qkv \(in a WindowAttention\), whose"),
        (Reads(), ["called", "used"], r"got used \(in a Reads\), whose"),
    ]
    for net, targets, said in cases:
        before = look(net)
        with pytest.raises(ValueError, match=said):
            inject(net, LoRA, targets)
        assert look(net) == before
    assert inject(Reads(), LoRA, ["called", "asked"]) == ["called", "asked"]
    assert inject(WindowAttention(8, (2, 2), 2), LoRA, "all-linear", exclude=["qkv"]) == [
        "cpb_mlp.0",
        "cpb_mlp.2",
        "proj",
    ]


def test_layers_that_are_no_plain_matrix() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    class Plain(nn.Linear):
        pass

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    cases = {
        "a ReLU": nn.ReLU(),
        "an Embedding"[1:]: nn.Embedding(3, 2),
        "a Own, whose forward is its own": Own(2, 2),
        "a StdConv2d, whose forward is its own": timm.layers.StdConv2d(2, 2, 3),
        "whose weight is computed": normed,
        "or not there yet": nn.LazyLinear(2),
        "a Conv2d with groups=2": nn.Conv2d(2, 2, 3, groups=2),
    }
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    cases["a weight of torch.uint8"] = packed
    for said, layer in cases.items():
        net = nn.Sequential(layer, nn.Linear(2, 2))
        assert said.lstrip("n ") in refusal(layer)
        with pytest.raises(TypeError, match=f"expected a Linear, Conv2d or Conv1D, got 0, a.*{refusal(layer)[2:9]}"):
            inject(net, LoRA, ["0", "1"])
        assert type(net[1]) is nn.Linear and type(net[0]) is type(layer)
    assert refusal(Plain(2, 2)) is None and view(Plain(2, 5)).out_features == 5


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        ((nn.Linear, ["head"]), {}, TypeError, "kind: expected a class of adapters, got <class 'torch.nn"),
        (("lora", ["head"]), {}, TypeError, "kind: expected a class of adapters, got 'lora'"),
        ((LoRA, [1]), {}, TypeError, r"targets: expected names of layers, or one regular expression, got \[1\]"),
        ((LoRA, None), {}, TypeError, "targets: expected names of layers"),
        ((LoRA, "(head"), {}, ValueError, r"targets: expected a regular expression, got '\(head'"),
        ((LoRA, ["head"]), {"exclude": 3}, TypeError, "exclude: expected names of layers"),
        ((LoRA, ["head"]), {"rank": 3}, TypeError, "rank"),
        ((LoRA, ["head"]), {"per_layer": {"q_proj": {}}}, ValueError, r"per_layer: expected names among \['head'\]"),
        ((LoRA, ["head"]), {"per_layer": {"head": None}}, ValueError, "at least one layer to adapt, got None for all"),
        ((LoRA, ["head"]), {"name": "used"}, ValueError, "name: expected a new one, got 'used'"),
        ((LoRA, ["head"]), {"name": "v1.0"}, ValueError, "name: expected a name without dots"),
        ((LoRA, ["head"]), {"name": ""}, ValueError, "name: expected a name without dots"),
        ((LoRA, ["head"]), {"name": "keys"}, ValueError, "no attribute of a ModuleDict, got 'keys'"),
        ((LoRA, ["mlp"]), {}, TypeError, "got blocks.0.mlp, a Sequential; name other targets or exclude it"),
    ],
)  # fmt: skip
def test_bad_arguments_change_nothing(arguments, options, error, said: str) -> None:
    net = model()
    inject(net, LoRA, ["q_proj"], name="used")
    before = look(net)
    with pytest.raises(error, match=said):
        inject(net, *arguments, **options)
    assert look(net) == before


@pytest.mark.parametrize(
    ("targets", "exclude", "said"),
    [
        (["q_proj", "v_porj"], (), r"targets: expected names of layers, .* got \['v_porj'\]"),
        (iter(["q_proj", "v_porj"]), (), r"targets: .* got \['v_porj'\]"),
        (["q_proj"], ["head", "haed"], r"exclude: .* got \['haed'\]"),
        (["q_proj"], "haed", r"exclude: .* got \['haed'\]"),
        ("all-linear", "all-lin", r"exclude: .* got \['all-lin'\]"),
    ],
)
def test_each_name_must_be_a_layers(targets, exclude, said: str) -> None:
    net = model()
    before = look(net)
    with pytest.raises(ValueError, match=said):
        inject(net, LoRA, targets, exclude=exclude)
    assert look(net) == before
    with pytest.raises(ValueError, match=r"targets: .* got \['v_porj'\]"):
        collect(net, ["q_proj", "v_porj"], [torch.randn(9, 4)], r=1)


def test_what_is_not_there_is_named() -> None:
    net = model()
    for call in (unmerge, merge, unload, lambda net: adapters(net), lambda net: activate(net, "default")):
        with pytest.raises((ValueError, RuntimeError), match=r"expected (one|some|a merged|active)"):
            call(net)
    inject(net, LoRA, ["head"], name="french")
    before = look(net)
    with pytest.raises(ValueError, match=r"names: expected some of \['french'\], got \['german'\]"):
        activate(net, "french", "german")
    with pytest.raises(ValueError, match=r"name: expected one of \['french'\], got 'default'"):
        adapters(net)
    assert look(net) == before
    activate(net)
    with pytest.raises(ValueError, match=r"active adapters to merge, got none of \['french'\]"):
        merge(net)


# -- real models


def test_a_model_of_timm_and_one_of_ours() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_classes=5).eval()
    for net, x in ((vit, torch.randn(2, 3, 32, 32)), (SmallCNN(width=4).eval(), torch.rand(2, 1, 28, 28))):
        y = net(x)
        convs = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
        inject(net, LoRA, "all-linear", name="linear", r=2)
        inject(net, LoRA, convs, name="convs", r=2)
        activate(net, "linear", "convs")
        assert torch.equal(net(x), y)
        for name in ("linear", "convs"):
            for adapter in adapters(net, name).values():
                nn.init.normal_(adapter.lora_B.weight, std=0.1)
        adapted = net(x)
        assert not torch.allclose(adapted, y, atol=1e-3)
        merge(net)
        assert_close(net(x), adapted, rtol=1e-4, atol=1e-4)
        unload(net)
        assert torch.equal(net(x), y)
