"""Heads and embeddings trained beside an adapter go into its file, and PEFT's files with them open here."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.files import config, load, save, state
from peftref.adapters.core.injection import adapters, inject, unload
from peftref.adapters.hydra import Hydra, save_as_lora
from tests.adapters.test_files import edit

quiet = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.tensor([[1, 5, 7, 2], [3, 3, 4, 19]])
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=3)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=8, num_labels=3)
    ),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)),
    "words": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "tied words": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
}
SEQUENCES = {"task_type": "SEQ_CLS"}
CASES = {  # the model, PEFT's options, what is beside the adapter in the end
    "bert": ("bert", {**SEQUENCES, "target_modules": ["query", "value"]}, ["classifier"]),
    "bert, all linear": ("bert", {**SEQUENCES, "target_modules": "all-linear"}, ["classifier"]),
    "a nested head": (
        "roberta",
        {**SEQUENCES, "target_modules": ["query", "dense"]},
        ["classifier.dense", "classifier.out_proj"],
    ),
    "a name that ends another": (
        "distilbert",
        {**SEQUENCES, "target_modules": ["q_lin"]},
        ["pre_classifier", "base_model.model.classifier"],
    ),
    "score": ("llama", {**SEQUENCES, "target_modules": ["q_proj"]}, ["score"]),
    "embeddings": (
        "words",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        ["model.embed_tokens", "lm_head"],
    ),
    "norms": (
        "words",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
        ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"],
    ),
    "encoder and decoder": (
        "t5",
        {"target_modules": ["q"], "modules_to_save": ["final_layer_norm"]},
        ["encoder.final_layer_norm", "decoder.final_layer_norm"],
    ),
}


def fresh(which: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[which]().eval()


@torch.no_grad()
def out(model: nn.Module) -> Tensor:
    extra = {"decoder_input_ids": TOKENS[:, :3]} if hasattr(model.config, "decoder_start_token_id") else {}
    return model(TOKENS, **(extra if model.config.is_encoder_decoder else {})).logits


@torch.no_grad()
def shake(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.5 * torch.randn(p.shape, generator=g))


def beside(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n]


@quiet
@pytest.mark.parametrize("case", CASES)
def test_pefts_open_here_and_ours_there(case: str, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    which, options, listed = CASES[case]
    theirs = peft.get_peft_model(fresh(which), peft.LoraConfig(r=2, **options))
    shake(theirs)
    y = out(theirs.eval())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fresh(which)
    load(ours, tmp_path / "theirs")
    assert torch.equal(out(ours.eval()), y)
    assert len(beside(ours)) == sum(
        "lora_" not in key for key in load_file(tmp_path / "theirs/adapter_model.safetensors")
    )
    assert config(ours)["modules_to_save"] == listed
    save(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(fresh(which), tmp_path / "ours").eval()
    assert torch.equal(out(back), y)
    again = fresh(which)
    load(again, tmp_path / "ours")
    assert torch.equal(out(again), y)


@quiet
def test_a_tied_head(tmp_path) -> None:
    """Where PEFT unties what it trains, a tied model cannot be the same; where it keeps the tie, it is."""
    peft = pytest.importorskip("peft")
    for case, modules, tying, said in (
        ("one", ["embed_tokens"], False, "a weight of its own for base_model.model.lm_head.weight"),
        ("two", ["embed_tokens", "lm_head"], False, "a weight for each of"),
        ("tied", ["embed_tokens", "lm_head"], True, None),
    ):
        options = peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=modules, ensure_weight_tying=tying, task_type="CAUSAL_LM"
        )
        theirs = peft.get_peft_model(fresh("tied words"), options)
        shake(theirs)
        theirs.eval().save_pretrained(tmp_path / case)
        ours = fresh("tied words")
        before = {n: t.clone() for n, t in ours.state_dict().items()}
        if said:
            with pytest.raises(ValueError, match=f"model: expected {said}"):
                load(ours, tmp_path / case)
            assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items()) and len(before) > 3
        else:
            load(ours, tmp_path / case)
            assert torch.equal(out(ours), out(theirs))
    ours = fresh("tied words")
    inject(ours, LoRA, ["q_proj"], r=2)
    ours.lm_head.weight.requires_grad_()
    shake(ours)
    save(ours, tmp_path / "ours")  # both names of the one weight
    back = peft.PeftModel.from_pretrained(fresh("tied words"), tmp_path / "ours").eval()
    assert torch.equal(out(back), out(ours))
    save(ours, tmp_path / "named", modules=["lm_head"])
    again = fresh("tied words")
    load(again, tmp_path / "named")
    assert torch.equal(out(again), out(ours))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
        self.token = nn.Parameter(torch.zeros(4))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body["norm"](self.body["fc"](x + self.token)))


def adapted() -> Net:
    net = Net()
    inject(net, LoRA, ["fc"], r=2)
    nn.init.normal_(adapters(net)["body.fc"].lora_B.weight)
    return net


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
HEAD = [f"base_model.model.head.{part}" for part in ("0.bias", "0.weight", "2.bias", "2.weight")]


def test_what_is_unfrozen_is_saved_whole(tmp_path) -> None:
    net = adapted()
    net.head.requires_grad_()
    net.body["norm"].bias.requires_grad_()  # one of two weights; statistics are part of the layer
    shake(net)
    net.train()(X)
    save(net, tmp_path)
    assert sorted(key for key in state(net) if "lora" not in key and "norm" not in key) == HEAD
    assert config(net)["modules_to_save"] == ["body.norm", "head.0", "head.2"]
    other = Net()
    load(other, tmp_path)
    assert torch.equal(other.eval()(X), net.eval()(X)) and other.body["norm"].num_batches_tracked == 1
    assert set(beside(other)) == {f"head.{k}" for k in ("0.weight", "0.bias", "2.weight", "2.bias")} | {
        "body.norm.weight", "body.norm.bias",
    }  # fmt: skip


def test_modules_may_be_named(tmp_path) -> None:
    """A head that has been frozen since, or none."""
    net = adapted()
    net.head.requires_grad_()
    shake(net)
    net.requires_grad_(False)
    assert "modules_to_save" not in config(net) and len(state(net)) == 2
    save(net, tmp_path, modules=["head"])
    other = Net()
    load(other, tmp_path)
    assert torch.equal(other.eval()(X), net.eval()(X)) and len(beside(other)) == 4
    other.requires_grad_(True)  # everything, as with freeze=False
    assert len(state(other, modules=())) == 2
    for wrong, said in ((["tail"], r"among \['body', .*got \['tail'\]"), (["body.fc"], r"among .*got \['body.fc'\]")):
        with pytest.raises(ValueError, match=f"modules: expected names of modules without adapters, {said}"):
            save(net, tmp_path / "no", modules=wrong)
    for wrong in ("head", 3, [3]):
        with pytest.raises(
            TypeError, match=f"modules: expected names of modules, or None, got {re.escape(repr(wrong))}"
        ):
            save(net, tmp_path / "no", modules=wrong)
    assert not (tmp_path / "no").exists()


def test_what_has_no_place_in_a_file_is_named(tmp_path) -> None:
    net = adapted()
    net.token.requires_grad_()
    net.body["fc"].base_layer.bias.requires_grad_()
    with pytest.raises(ValueError, match="model: expected trained parameters in .*, got token, body.fc.bias; freeze"):
        save(net, tmp_path / "no")
    assert not (tmp_path / "no").exists() and len(state(net, modules=[])) == 2


def test_one_model_has_one_head(tmp_path) -> None:
    first, second = adapted(), adapted()
    for net, scale in ((first, 1.0), (second, 2.0)):
        net.head.requires_grad_()
        nn.init.constant_(net.head[2].weight, scale)
    save(first, tmp_path / "first")
    save(second, tmp_path / "second")
    both = Net()
    load(both, tmp_path / "first", "first")
    y = both.eval()(X)
    load(both, tmp_path / "first", "same")  # another adapter for the same head
    with pytest.raises(ValueError, match="modules_to_save: expected the weights .* got others for .*head.2.weight"):
        load(both, tmp_path / "second", "second")
    assert torch.equal(both(X), y)
    unload(both)
    load(both, tmp_path / "second", "second")
    assert torch.equal(both(X), second.eval()(X))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != HEAD[0]}, f"missing: {HEAD[0]}$"),
        (lambda t: {k: v for k, v in t.items() if "head.0" not in k}, "missing: base_model.model.head.0$"),
        (lambda t: t | {HEAD[3]: torch.zeros(3, 4)}, rf"shapes: {HEAD[3]} \(3, 4\) for \(2, 4\)"),
        (lambda t: t | {HEAD[3]: torch.full((2, 4), float("nan"))}, f"not finite: {HEAD[3]}$"),
        (
            lambda t: t | {HEAD[3]: torch.zeros(2, 4, dtype=torch.int8)},
            f"types: {HEAD[3]} torch.int8 for torch.float32",
        ),
    ],
)
def test_heads_that_do_not_fit(change, said: str, tmp_path) -> None:
    net = adapted()
    net.head.requires_grad_()
    save(net, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    other = Net()
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load(other, tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    edit(tmp_path, modules_to_save="head")
    with pytest.raises(ValueError, match="modules_to_save: expected a list, got 'head'"):
        load(other, tmp_path)


def test_a_value_that_the_model_cannot_hold_is_refused(tmp_path) -> None:
    net = adapted()
    net.head.requires_grad_()
    nn.init.constant_(net.head[2].weight, 1e6)
    save(net, tmp_path)
    with pytest.raises(ValueError, match="not finite: base_model.model.head.2.weight"):
        load(Net().half(), tmp_path)


@quiet
def test_hydra_as_a_lora_with_its_head(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    net = fresh("bert")
    inject(net, Hydra, ["query", "value"], r_par=1, r_seq=1)
    net.classifier.requires_grad_()
    shake(net)
    save_as_lora(net, tmp_path)
    back = peft.PeftModel.from_pretrained(fresh("bert"), tmp_path).eval()
    torch.testing.assert_close(out(back), out(net), rtol=1e-5, atol=1e-6)
