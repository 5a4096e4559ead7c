"""Files of every kind that are refused, and the model after each; names that confuse; what layers share."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.adapter import Adapter
from peftref.adapters.core.files import config, load, save, state
from peftref.adapters.core.injection import adapters, inject
from peftref.adapters.core.layers import Layer


class Shared(Adapter):
    """Layers share the factor ``down``, trained, and ``bank``, which no file keeps."""

    kind, options = "test_shared_factor", ("shape",)

    def __init__(self, base: Layer, shape: tuple[int, ...], down: nn.Parameter, bank: Tensor) -> None:
        super().__init__()
        self.shape, self.down, self.bank = tuple(shape), down, bank
        self.up = nn.Parameter(torch.zeros(base.out_features, len(down)))

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return x @ (self.bank * self.down).T @ self.up.T


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def trained(**options) -> nn.Sequential:
    model = net()
    inject(model, LoRA, ["0", "2"], **{"r": 2, **options})
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.lora_B.weight)
    return model


def edit(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


KEY = "base_model.model.0.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: drop(s, KEY), f"missing: {KEY}$"),
        (
            lambda s: s | {"base_model.model.1.lora_A.weight": torch.zeros(2, 4)},
            "unexpected: base_model.model.1.lora_A.weight$",
        ),
        (lambda s: s | {KEY: torch.zeros(3, 4)}, rf"shapes: {KEY} \(3, 4\) for \(2, 4\)"),
        (
            lambda s: s | {"base_model.model.0.base_layer.weight": torch.zeros(4, 4)},
            "unexpected: .*0.base_layer.weight$",
        ),
        (lambda s: {k.replace("base_model.model.", ""): v for k, v in s.items()}, "missing: .*unexpected: 0.lora_A"),
    ],
)
def test_tensors_that_do_not_fit(change, said: str, tmp_path) -> None:
    save(trained(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    other = net()
    with pytest.raises(ValueError, match=said):
        load(other, tmp_path)
    assert type(other[0]) is nn.Linear and other[0].weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"use_dora": True}, ValueError, "use_dora: expected one of .*, the only ones implemented, got True"),
        ({"bias": "all"}, ValueError, "bias: expected one of .*got 'all'"),
        ({"lora_bias": True}, ValueError, "lora_bias"),
        ({"modules_to_save": ["2"]}, ValueError, "missing: base_model.model.2$"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights: .*'gaussian'.*got 'pissa'"),
        ({"layers_to_transform": [0]}, ValueError, "layers_to_transform"),
        ({"target_parameters": ["x"]}, ValueError, "target_parameters"),
        ({"trainable_token_indices": [1]}, ValueError, "trainable_token_indices"),
        ({"an_option_of_tomorrow": 0.5}, ValueError, "an_option_of_tomorrow"),
        ({"fan_in_fan_out": True}, ValueError, "fan_in_fan_out: expected False for a model without Conv1D"),
        (
            {"peft_type": "OFT"},
            ValueError,
            "peft_type: expected a method that is known or imported, .*'lora'.*got 'OFT'",
        ),
        ({"peft_type": None}, ValueError, "peft_type"),
        ({"peft_type": "os.path"}, ValueError, "peft_type"),
        ({"r": 3}, ValueError, "shapes"),
        ({"target_modules": ["0"]}, ValueError, "unexpected: base_model.model.2.lora_A"),
        ({"target_modules": ["fc"]}, ValueError, r"targets: expected names of layers, of which there are \['0', '2'\]"),
        ({"target_modules": None}, TypeError, "targets: expected names"),
        ({"target_modules": {"0": 1}}, TypeError, "target_modules: expected names of layers or one regular expression"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules: expected names of layers or one regular expression"),
        ({"use_rslora": "false"}, ValueError, "use_rslora: expected a bool, got 'false'"),
        ({"use_rslora": 1}, ValueError, "use_rslora: expected a bool, got 1"),
        ({"fan_in_fan_out": "false"}, ValueError, "fan_in_fan_out: expected a bool, got 'false'"),
        ({"r": True}, ValueError, "r: expected a int, got True"),
        ({"lora_dropout": "0.1"}, ValueError, "lora_dropout: expected a float, got '0.1'"),
        ({"lora_alpha": None}, ValueError, "lora_alpha: expected"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha: expected"),
        ({"rank_pattern": [2]}, TypeError, r"rank_pattern: expected a dictionary of values by name, got \[2\]"),
        ({"rank_pattern": {"0": "2"}}, ValueError, "rank_pattern: expected finite numbers, got '2' for 0"),
        ({"alpha_pattern": {"0": True}}, ValueError, "alpha_pattern: expected finite numbers, got True for 0"),
        ({"alpha_pattern": {"(": 2}}, ValueError, r"alpha_pattern: expected regular expressions, got '\('"),
        (
            {"alpha_pattern": {"fc": 2}},
            ValueError,
            r"alpha_pattern: expected patterns of adapted layers, got 'fc', none of \['0', '2'\]",
        ),
        ({"per_layer": ["0"]}, ValueError, "per_layer: expected the options of single layers, by name"),
        ({"per_layer": {"1": {"r": 2}}}, ValueError, r"per_layer: expected names among \['0', '2'\], got \['1'\]"),
        ({"modules_to_save": [0]}, ValueError, r"modules_to_save: expected names of modules, got \[0\]"),
        ({"layer_replication": [[0, 1]]}, ValueError, "layer_replication"),
        ({"corda_config": {"x": 1}}, ValueError, "corda_config"),
        ({"alora_invocation_tokens": [1]}, ValueError, "alora_invocation_tokens"),
        ({"layers_pattern": "h"}, ValueError, "layers_pattern"),
        ({"exclude_modules": ["2"]}, ValueError, "unexpected: base_model.model.2.lora_A"),
    ],
)
def test_configurations_that_do_not_fit(changes, error, said: str, tmp_path) -> None:
    save(trained(), tmp_path)
    edit(tmp_path, **changes)
    other = net()
    with pytest.raises(error, match=said):
        load(other, tmp_path)
    assert type(other[0]) is nn.Linear and other[0].weight.requires_grad


def test_a_name_that_is_taken_and_files_that_are_not_there(tmp_path) -> None:
    model = trained()
    save(model, tmp_path / "deep" / "er")
    with pytest.raises(ValueError, match="name: expected a new one, got 'default'"):
        load(model, tmp_path / "deep" / "er")
    with pytest.raises(FileNotFoundError):
        load(net(), tmp_path)
    with pytest.raises(ValueError, match="name: expected one of"):
        save(model, tmp_path / "no", name="other")
    assert not (tmp_path / "no").exists()


def test_names_that_confuse(tmp_path) -> None:
    """Modules and adapters called like the parts of a key."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"weight": nn.Linear(3, 3), "lora": nn.Linear(3, 3), "base_layer": nn.Linear(3, 3)})
        return nn.ModuleDict({"lora_A": inner, "default": nn.Linear(3, 3)})

    model, other = make(), make()
    names = ["lora_A.weight", "lora_A.lora", "lora_A.base_layer", "default"]
    for adapter in ("lora", "lora_A", "base_layer", "weight"):
        assert inject(model, LoRA, names, name=adapter, r=1) == names
        save(model, tmp_path / adapter, adapter)
        assert load(other, tmp_path / adapter, f"{adapter}_again") == names
        ours, theirs = state(model, adapter), state(other, f"{adapter}_again")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_state_is_a_copy() -> None:
    model = trained()
    for tensor in state(model).values():
        tensor.zero_()
    assert all(a.lora_B.weight.any() for a in adapters(model).values())


def test_layers_that_differ_are_told_apart(tmp_path) -> None:
    model = trained(per_layer={"2": {"r": 3, "lora_alpha": 5}})
    written = config(model)
    assert written["rank_pattern"] == {"^2": 3} and written["alpha_pattern"] == {"^2": 5} and written["r"] == 2
    save(model, tmp_path)
    other = net()
    load(other, tmp_path)
    assert torch.equal(other(torch.ones(4)), model(torch.ones(4)))
    mixed = trained(per_layer={"2": {"use_rslora": True}})
    with pytest.raises(ValueError, match="use_rslora: expected one value for all layers"):
        config(mixed)


def test_a_name_that_ends_another_is_written_exactly(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(2, 2), "block": nn.ModuleDict({"fc": nn.Linear(2, 2)})})

    model, other = make(), make()
    inject(model, LoRA, r"fc")
    assert config(model)["target_modules"] == "fc"
    save(model, tmp_path)
    assert load(other, tmp_path) == ["fc"]


def test_what_layers_share_is_stored_once_and_given_again(tmp_path) -> None:
    def factors() -> dict:
        return {"down": nn.Parameter(torch.randn(2, 4)), "bank": torch.full((4,), 2.0)}

    model, other, x = net(), net(), torch.randn(3, 4)
    own = {"2": {"shape": (2, 2)}}
    inject(model, Shared, ["0", "2"], shape=(4,), per_layer=own, **factors())
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.up)
    assert list(state(model)) == [f"base_model.model.{end}" for end in ("0.down", "0.up", "2.up")]
    assert config(model)["per_layer"] == own
    save(model, tmp_path)
    load(other, tmp_path, **factors())
    assert torch.equal(other(x), model(x)) and adapters(other)["2"].shape == (2, 2)
    with pytest.raises(TypeError, match="bank"):
        load(net(), tmp_path, down=nn.Parameter(torch.randn(2, 4)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (torch.full((2, 4), float("nan")), f"not finite: {KEY}$"),
        (torch.full((2, 4), float("-inf")), f"not finite: {KEY}$"),
        (torch.full((2, 4), 1e300, dtype=torch.float64), f"not finite: {KEY}$"),  # in float32
        (torch.ones(2, 4, dtype=torch.int8), f"types: {KEY} torch.int8 for torch.float32$"),
        (torch.ones(2, 4, dtype=torch.int64), f"types: {KEY} torch.int64"),
        (torch.ones(2, 4, dtype=torch.bool), f"types: {KEY} torch.bool"),
        (torch.ones(2, 4, dtype=torch.complex64), f"types: {KEY} torch.complex64"),
        (torch.tensor(1.0), rf"shapes: {KEY} \(\) for \(2, 4\)"),
        (torch.ones(4, 2), rf"shapes: {KEY} \(4, 2\) for \(2, 4\)"),
        (torch.ones(8), rf"shapes: {KEY} \(8,\) for \(2, 4\)"),
    ],
)
def test_tensors_that_are_no_weights(changed: Tensor, said: str, tmp_path) -> None:
    save(trained(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {KEY: changed}, file)
    other = net()
    with pytest.raises(ValueError, match=said):
        load(other, tmp_path)
    assert type(other[0]) is nn.Linear and other[0].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_any_precision(dtype: torch.dtype, tmp_path) -> None:
    save(trained(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = {key: t.to(dtype) for key, t in load_file(file).items()}
    save_file(kept, file)
    other = net()
    load(other, tmp_path)
    assert all(torch.equal(t, kept[key].to(t.dtype)) for key, t in state(other).items())


def test_folders_without_the_two_files(tmp_path) -> None:
    save(trained(), tmp_path)
    weights, spec = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    text = spec.read_text()
    for broken in ("[]", '"LORA"', "null"):
        spec.write_text(broken)
        with pytest.raises(ValueError, match=r"path: expected an object {...} in adapter_config.json, got a "):
            load(net(), tmp_path)
    for broken in (b"{", b"", b"\xff\xfe"):
        spec.write_bytes(broken)
        with pytest.raises(ValueError, match="path: expected JSON in adapter_config.json, got what cannot be read"):
            load(net(), tmp_path)
    spec.write_text(text)
    for broken in (b"", b"junk" * 9):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="path: expected tensors in adapter_model.safetensors, got what cannot be"):
            load(net(), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"path: expected adapter_model.safetensors .*adapter_model.bin, a pickle"
    ):
        load(net(), tmp_path)
    spec.unlink()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="path: expected adapter_config.json in .*, got no such file"):
            load(net(), folder)


def test_options_of_a_newer_peft_that_are_off(tmp_path) -> None:
    model = trained()
    save(model, tmp_path)
    edit(
        tmp_path, use_tomorrow=False, tomorrow_config=None, tomorrow_names=[], tomorrow_pattern={}, bias="none",
        use_dora=False, lora_bias=False, layers_to_transform=None, target_parameters=None, exclude_modules=None,
        layer_replication=None, loftq_config={}, corda_config=None, megatron_config=None, peft_version="0.99.0",
        eva_config={"rho": 2.0}, init_lora_weights="eva", task_type="CAUSAL_LM",
        modules_to_save=["classifier", "score"], runtime_config={"ephemeral_gpu_offload": False},
        ensure_weight_tying=True, arrow_config=None,
    )  # fmt: skip
    other = net()
    load(other, tmp_path)
    assert torch.equal(other(torch.ones(4)), model(torch.ones(4)))


def test_patterns_and_names_of_a_file_that_match_nothing(tmp_path) -> None:
    net = nn.ModuleDict({"q": nn.Linear(3, 3), "k": nn.Linear(3, 3)})
    inject(net, LoRA, ["q", "k"], r=2, per_layer={"q": {"lora_alpha": 3}})
    save(net, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())

    def opened(**changes: object) -> nn.Module:
        (tmp_path / "adapter_config.json").write_text(json.dumps(written | changes))
        other = nn.ModuleDict({"q": nn.Linear(3, 3), "k": nn.Linear(3, 3)})
        load(other, tmp_path)
        return other

    for pattern in ("alpha_pattern", "rank_pattern"):
        for key, said in (
            ("^p", "patterns of adapted layers, got '\\^p', none of"),
            ("(q", r"expressions, got '\(q' \("),
        ):
            with pytest.raises(ValueError, match=f"{pattern}: expected .*{said}"):
                opened(**{pattern: {key: 3}})
        with pytest.raises(TypeError, match=f"{pattern}: expected a dictionary"):
            opened(**{pattern: ["q"]})
    first = opened(alpha_pattern={"q": 5, "[qk]": 7})
    assert [a.lora_alpha for a in adapters(first).values()] == [5, 7]  # the first that fits, as in PEFT
    # one file for several models: its tensors say which layers are meant
    assert list(adapters(opened(target_modules=["q", "k", "query"], exclude_modules=["head"]))) == ["q", "k"]
