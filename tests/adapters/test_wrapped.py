"""Every adapter under every wrapper of torch: files, targets and errors have the names without the wrapper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peftref._wrapped import unwrapped
from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.files import config, load, save, state
from peftref.adapters.core.host import Host
from peftref.adapters.core.injection import adapters, inject, merge, unload, unmerge
from peftref.adapters.eva import collect, inject_eva
from peftref.adapters.hydra import Hydra, save_as_lora
from tests.adapters.test_contract import LAYERS, METHODS


class Net(nn.Module):
    """A body in which a layer is adapted, and one beside it."""

    def __init__(self, layer: str = "linear") -> None:
        super().__init__()
        torch.manual_seed(0)
        make, self.shape = LAYERS[layer]
        self.body = nn.Sequential(make(True), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return self.head(y) if y.ndim == 2 and y.shape[1] == 4 else y


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def around_the_body(net: nn.Module) -> nn.Module:
        net.body = wrap(net.body)
        return net

    return around_the_body


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net,
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "compiled, parallel": lambda net: compiled(nn.DataParallel(net)),
    "distributed, compiled": lambda net: nn.parallel.DistributedDataParallel(compiled(net)),
    "compiled inside": inside(compiled),
    "parallel inside": inside(nn.DataParallel),
    "checkpointed inside": inside(checkpoint_wrapper),
    "all": lambda net: nn.DataParallel(compiled(inside(compiled)(net))),
}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    start = tmp_path_factory.mktemp("group") / "start"
    dist.init_process_group("gloo", init_method=f"file://{start}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.no_grad()
def out(model: nn.Module, x: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return unwrapped(model)(x)


@torch.no_grad()
def shake(model: nn.Module, name: str = "default") -> None:
    g = torch.Generator().manual_seed(1)
    for adapter in adapters(model, name).values():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", {row.kind: method for method, row in METHODS.items()}.values())
def test_files_have_the_plain_names(method: str, wrapper: str, tmp_path) -> None:
    """From a wrapped model into a plain one and back; the plain model's file is the same, byte for byte."""
    row = METHODS[method]
    extra = row.extra()
    net = Net(row.layers[0]).eval()
    x = torch.randn(3, *net.shape)
    inject(net, row.kind, r"body\.0", **row.options, **extra)
    shake(net)
    y = out(net, x)
    save(net, tmp_path / "plain")
    wrapped = WRAPPERS[wrapper](net)
    save(wrapped, tmp_path / "wrapped")
    assert state(wrapped).keys() == load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    for source in ("plain", "wrapped"):
        other = WRAPPERS[wrapper](Net(row.layers[0]).eval())
        assert not torch.equal(out(other, x), y)
        assert load(other, tmp_path / source, name="again", **extra) == ["body.0"]
        assert torch.equal(out(other, x), y)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_head_goes_along(wrapper: str, tmp_path) -> None:
    net = WRAPPERS[wrapper](Net().eval())
    inject(net, LoRA, ["body.0"] if wrapper in ("plain", "compiled", "parallel") else r".*body.*\.0", r=2)
    unwrapped(net).head.requires_grad_()
    shake(net)
    nn.init.normal_(unwrapped(net).head.weight)
    save(net, tmp_path)
    other = WRAPPERS[wrapper](Net().eval())
    load(other, tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(out(other, x), out(net, x))
    assert config(other)["modules_to_save"] == ["head"] and config(net)["target_modules"] == ["body.0"]


@pytest.mark.parametrize("targets", [["body.0", "head"], r"body\.0|head", "all-linear"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_targets_of_a_file_and_of_eva_are_plain_names(wrapper: str, targets, tmp_path) -> None:
    x = torch.randn(20, 8)
    right = collect(Net(), targets, [x], r=2)
    model = WRAPPERS[wrapper](Net())
    with torch.no_grad(), torch.compiler.set_stance("default"):
        if wrapper == "compiled inside":
            model(x)  # compiled before anyone looks
    found = collect(model, targets, [x], r=2)
    assert found.ranks == right.ranks and list(found.spectra) == ["body.0", "head"]
    for n, spectrum in found.spectra.items():
        assert torch.equal(spectrum.components, right.spectra[n].components)
    plain = Net()
    for net in (plain, model):
        assert inject_eva(net, found, ranks={"body.0": 2, "head": 1}, name="eva") == ["body.0", "head"]
    assert all(torch.equal(state(model, "eva")[key], t) for key, t in state(plain, "eva").items())


def test_what_was_compiled_before_loading_uses_the_adapter(tmp_path) -> None:
    source = Net().eval()
    inject(source, LoRA, ["body.0"], r=2)
    shake(source)
    save(source, tmp_path)
    x = torch.randn(3, 8)
    for wrapper in ("compiled", "compiled inside"):
        model = WRAPPERS[wrapper](Net().eval())
        with torch.no_grad():
            before = model(x)
            load(model, tmp_path)
            assert torch.equal(model(x), source(x)) and not torch.equal(model(x), before)


def test_a_layer_compiled_by_itself_is_refused(tmp_path) -> None:
    """Its call is fixed, so that a host in its place inside would never be called."""
    source = Net()
    inject(source, LoRA, ["body.0"], r=2)
    save(source, tmp_path)
    model = Net()
    model.body[0] = compiled(model.body[0])
    for call in (lambda: load(model, tmp_path), lambda: inject(model, LoRA, ["body.0"], r=2)):
        with pytest.raises(ValueError, match=re.escape("one by one, got ['body.0']")):
            call()
    assert not any(isinstance(m, Host) for m in model.modules())


def test_names_that_only_look_like_wrappers(tmp_path) -> None:
    """An averaged model's ``module``, PEFT's own words: part of the name."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"base_layer": nn.Linear(3, 3), "modules_to_save": nn.Linear(3, 3)})
        return nn.ModuleDict({"module": inner, "model": nn.ModuleDict({"adapters": nn.Linear(3, 3)})})

    names = ["module.base_layer", "module.modules_to_save", "model.adapters"]
    net, other = make(), make()
    inject(net, LoRA, names[:2], r=1)
    net["model"]["adapters"].requires_grad_()
    shake(net)
    nn.init.normal_(net["model"]["adapters"].weight)
    save(nn.DataParallel(net), tmp_path)
    assert load(other, tmp_path) == names[:2]
    assert torch.equal(other["model"]["adapters"].weight, net["model"]["adapters"].weight)
    theirs = state(other)
    assert all(torch.equal(theirs[key], t) for key, t in state(net).items())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_hydra_as_a_lora(wrapper: str, tmp_path) -> None:
    net = Net()
    inject(net, Hydra, [r"body.0"], bias=False)
    shake(net)
    net.body[0].base_layer.bias.data.zero_()
    save_as_lora(net, tmp_path / "plain")
    save_as_lora(WRAPPERS[wrapper](net), tmp_path / "wrapped")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_know_no_wrapper(wrapper: str) -> None:
    """Injected into the wrapped model: names, regular expressions and what is reported are the plain model's."""
    for targets in (["body.0"], r"body\.0", "all-linear"):
        model = WRAPPERS[wrapper](Net())
        plain = Net()
        torch.manual_seed(0)
        expected = inject(plain, LoRA, targets, r=2, per_layer={"body.0": {"r": 1}})
        torch.manual_seed(0)
        assert inject(model, LoRA, targets, r=2, per_layer={"body.0": {"r": 1}}) == expected
        assert list(adapters(model)) == expected
        shake(plain)
        shake(model)
        x = torch.randn(3, 8)
        assert torch.equal(out(model, x), out(plain, x))
        for change in (merge, unmerge, unload):
            change(plain)
            change(model)
            assert torch.equal(out(model, x), out(plain, x))
    with pytest.raises(ValueError, match=re.escape("of which there are ['body.0', 'head'], got ['bdoy.0']")):
        inject(model, LoRA, ["bdoy.0"], r=2)


def test_an_output_layer_is_known_through_a_wrapper() -> None:
    class Transformer(Net):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

    for wrapper, wrap in WRAPPERS.items():
        assert inject(wrap(Transformer()), LoRA, "all-linear", r=2) == ["body.0"], wrapper
