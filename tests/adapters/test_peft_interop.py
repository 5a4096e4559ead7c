"""Hugging Face PEFT opens what we save, we open what it saves, and both train and merge alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.files import load, save
from peftref.adapters.core.injection import adapters, inject, merge, unmerge

peft = pytest.importorskip("peft")


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Linear(4, 6, bias=False)
        self.tail = nn.ModuleDict({"fc": nn.Linear(6, 5)})

    def forward(self, x: Tensor) -> Tensor:
        return self.tail["fc"](self.fc(self.conv(x).mean((-1, -2))).relu())


def vision() -> Vision:
    return Vision()


def gpt2() -> nn.Module:  # Conv1D, and a head tied to the embedding
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    )


TOKENS = torch.tensor([[1, 5, 7, 2], [3, 3, 0, 19]])
MODELS = {
    "vision": (vision, torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))),
    "gpt2": (gpt2, TOKENS),
    "llama": (llama, TOKENS),
}
CONFIGS = {
    "plain": ("vision", {"r": 2, "lora_alpha": 3, "target_modules": ["fc", "conv"]}),
    "patterns": (
        "vision",
        {"r": 2, "target_modules": ["fc", "conv"], "rank_pattern": {"tail.fc": 4, "^fc": 1}, "use_rslora": True,
         "alpha_pattern": {"c.nv": 5}, "lora_dropout": 0.2},
    ),
    "regex": ("vision", {"r": 3, "target_modules": r"fc|co.*"}),
    "excluded": ("llama", {"r": 2, "target_modules": ["q_proj", "down_proj"], "exclude_modules": ["0.mlp.down_proj"]}),
    "all": ("llama", {"r": 1, "lora_alpha": 1, "target_modules": "all-linear"}),
    "conv1d": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_dropout": 0.1}),
    "conv1d-all": ("gpt2", {"r": 2, "target_modules": "all-linear", "fan_in_fan_out": True}),
    "tied": ("gpt2", {"r": 2, "target_modules": ["lm_head"]}),
}  # fmt: skip


def fresh(which: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = MODELS[which]
    return make().eval(), x


def out(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


@torch.no_grad()
def shake(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(0.5 * torch.randn(p.shape, generator=g))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGS)
def test_theirs_opens_here_and_ours_there(case: str, tmp_path) -> None:
    which, options = CONFIGS[case]
    model, x = fresh(which)
    before = out(model, x)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")

    ours, _ = fresh(which)
    load(ours, tmp_path / "theirs", name="from_peft")
    y = out(ours, x)
    assert_close(y, out(theirs, x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(y, before, atol=1e-3)

    save(ours, tmp_path / "ours", "from_peft")
    back = peft.PeftModel.from_pretrained(fresh(which)[0], tmp_path / "ours").eval()
    assert torch.equal(out(back, x), out(theirs, x))
    assert sum("lora_A" in n for n, _ in back.named_modules()) == sum("lora_A" in n for n, _ in theirs.named_modules())

    if case != "tied":  # there PEFT changes the embedding too
        merge(ours)
        assert_close(out(ours, x), out(theirs.merge_and_unload(), x), rtol=1e-5, atol=1e-6)
        unmerge(ours)
        assert torch.equal(out(ours, x), y)


@pytest.mark.filterwarnings("ignore")
def test_made_here_with_ranks_by_layer_opens_there(tmp_path) -> None:
    ours, x = fresh("vision")
    inject(ours, LoRA, ["conv", "fc"], r=2, per_layer={"fc": {"r": 3}, "tail.fc": {"r": 1, "lora_alpha": 5}})
    shake(ours)
    save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh("vision")[0], tmp_path).eval()
    assert_close(out(theirs, x), out(ours, x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_train_alike(dtype: torch.dtype, tmp_path) -> None:
    model, x = fresh("llama")
    theirs = peft.get_peft_model(model.to(dtype), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    theirs.save_pretrained(tmp_path)
    ours = fresh("llama")[0].to(dtype)
    load(ours, tmp_path)
    curves = []
    for net in (theirs, ours):
        params = [p for p in net.parameters() if p.requires_grad]
        assert len(params) == 8 and all(p.dtype == torch.float32 for p in params)
        optimizer, losses = torch.optim.AdamW(params, lr=1e-2), []
        for _ in range(4):
            loss = net(x, labels=x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert_close(*map(torch.tensor, curves), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert curves[1][-1] < curves[1][0]


@pytest.mark.filterwarnings("ignore")
def test_the_start_is_drawn_alike() -> None:
    theirs = peft.get_peft_model(fresh("vision")[0], peft.LoraConfig(r=32, target_modules=["fc", "conv"]))
    ours, _ = fresh("vision")
    inject(ours, LoRA, ["fc", "conv"], r=32)
    for name, adapter in adapters(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        for part in ("lora_A", "lora_B"):
            a, b = getattr(adapter, part).weight, getattr(other, part)["default"].weight
            assert a.shape == b.shape
            assert_close(a.abs().max(), b.abs().max(), rtol=0.1, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_what_it_can_and_we_cannot_is_refused(options: dict, said: str, tmp_path) -> None:
    theirs = peft.get_peft_model(fresh("vision")[0], peft.LoraConfig(r=2, target_modules=["fc"], **options))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{said}: expected"):
        load(fresh("vision")[0], tmp_path)


def test_a_layer_in_two_places_and_a_reflecting_convolution(tmp_path) -> None:
    """Where PEFT's model is another one than ours, though the file is the same."""

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
        return nn.Sequential(conv, nn.Tanh(), conv)

    ours, x = made(), torch.randn(1, 2, 5, 5)
    assert inject(ours, LoRA, ["0"], r=2) == ["0"]
    nn.init.normal_(adapters(ours)["0"].lora_B.weight)
    assert ours[0] is ours[2]
    save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path).eval()
    inner = theirs.base_model.model
    assert type(inner[2]) is nn.Conv2d and inner[2] is inner[0].base_layer  # one of the two places
    layer = inner[0]
    assert not torch.allclose(layer(x), ours[0](x), atol=1e-3)  # theirs pads the update's input with zeros,
    layer.merge()
    assert_close(layer(x), ours[0](x), rtol=1e-4, atol=1e-5)  # and merged it does not
