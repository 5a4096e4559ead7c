"""Which layers of a model are meant, under which names, and how to put something else in their place.

Names know nothing of the wrappers of torch, and a wrapper is no layer: in ``torch.compile(net)``, ``DataParallel(net)``
and around a part of the model, modules are called what they are called without.

>>> from torch import nn
>>> net = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "out": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
>>> list(find(net, ["q_proj"])), list(find(net, "out.0")), list(find(net, "all-linear"))
(['q_proj'], ['out.0'], ['q_proj', 'out.0'])
>>> find(net, ["out.1"])
Traceback (most recent call last):
TypeError: targets: expected a Linear, Conv2d or Conv1D, got out.1, a ReLU; name other targets or exclude it
>>> find(nn.MultiheadAttention(4, 2), ["out_proj"])
Traceback (most recent call last):
ValueError: targets: expected layers that are called, got out_proj (in a MultiheadAttention), whose weights are used ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import nn

from ..._wrapped import unwrapped
from .bypass import bypassed
from .host import Host
from .layers import refusal

__all__ = ["by_pattern", "find", "frozen_module", "matches", "modules_by_name", "swap"]


def frozen_module(module: nn.Module) -> nn.Module:
    """The frozen module of a host; any other module as it is."""
    return module.base_layer if isinstance(module, Host) else module


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once, under the first name it had before adapters came; in a host's place the host itself."""
    first: dict[int, tuple[str, nn.Module]] = {}
    for n, m in _walk(model):
        first.setdefault(id(m), (n, m))
    return dict(first.values())


def find(
    model: nn.Module,
    targets: str | Iterable[str],
    exclude: str | Iterable[str] = (),
    *,
    any_module: bool = False,
    all_names: bool = True,
) -> dict[str, nn.Module]:
    """The modules meant by ``targets``, by their first names.

    Args:
        model: any module, with adapters or without; of a host, the frozen module is given.
        targets: names or ends of names, a regular expression for the whole name, or ``"all-linear"``.
        exclude: those to leave out, in the same ways.
        any_module: do not ask for a layer that can be seen as a matrix.
        all_names: refuse a name, or an expression to exclude, that is no module's. False, for a file that was made for
            several models: one module is enough.

    Raises:
        TypeError: a layer of another type than Linear, Conv2d and Conv1D; names that are no strings.
        ValueError: no layer matches, or not each of the names does, or a layer is used without being called, or is
            compiled by itself, so that nothing put in its place would be called.
    """
    targets = _listed(targets)
    exclude = _listed(exclude)
    hit = matches("targets", targets, model)
    out = matches("exclude", exclude, model)
    aliases: dict[int, list[str]] = {}  # of a module in several places, any name will do
    for n, m in _walk(model):
        aliases.setdefault(id(m), []).append(n)
    if all_names:
        for label, wanted in (("targets", targets), ("exclude", exclude)):
            _refuse_unmatched(label, wanted, model)
    found = {
        n: m
        for n, m in modules_by_name(model).items()
        if n and any(map(hit, aliases[id(m)])) and not any(map(out, aliases[id(m)]))
    }
    if not found:
        raise ValueError(f"targets: expected names of layers, of which there are {_some(model)}, got {targets!r}")
    for n, m in found.items():
        why = None if any_module else refusal(frozen_module(m))
        if why:
            raise TypeError(
                f"targets: expected a Linear, Conv2d or Conv1D, got {n}, {why}; name other targets or exclude it"
            )
    wanted = {alias for m in found.values() for alias in aliases[id(m)]}
    passed_over = {f"{n} (in a {parent})" for n, parent in _bypassed_children(model) if n in wanted}
    if passed_over:
        raise ValueError(
            f"targets: expected layers that are called, got {', '.join(sorted(passed_over))}, whose weights are used "
            "without a call, so that an adapter could be passed over; name other targets or exclude them"
        )
    fixed = {id(m._orig_mod) for m in unwrapped(model).modules() if type(m).__name__ == "OptimizedModule"}
    alone = [n for n, m in found.items() if id(m) in fixed]
    if alone:
        raise ValueError(f"targets: expected layers that are not compiled one by one, got {alone}; compile them later")
    return {n: frozen_module(m) for n, m in found.items()}


def exactly(names: Iterable[str]) -> str:
    """The regular expression of these names and no others.

    >>> exactly(["0.q", "1.q"])
    '0\\\\.q|1\\\\.q'
    """
    return "|".join(map(re.escape, names))


def swap(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new[id(module)]`` in every place of the model where ``module`` is."""
    for parent in list(model.modules()):
        for attr, child in parent._modules.items():
            if id(child) in new:
                parent._modules[attr] = new[id(child)]


def by_pattern(label: str, patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """PEFT's rule for values of single layers: the first key that is the name, or its end after a dot, as a pattern.

    >>> by_pattern("rank_pattern", {"^0.q": 2, "[qv]": 4}, ["0.q", "1.q", "1.k"])
    {'0.q': 2, '1.q': 4}

    Raises:
        ValueError: a key that is no regular expression, or one that matches no name.
        TypeError: no dictionary.
    """
    if not isinstance(patterns, Mapping):
        raise TypeError(f"{label}: expected a dictionary of values by name, got {patterns!r}")
    names = list(names)
    found: dict[str, Any] = {}
    for key, value in patterns.items():
        try:
            hit = [n for n in names if re.match(rf"(.*\.)?({key})$", n)]
        except re.error as error:
            raise ValueError(f"{label}: expected regular expressions, got {key!r} ({error})") from None
        if not hit:
            raise ValueError(f"{label}: expected patterns of adapted layers, got {key!r}, none of {_shortened(names)}")
        found = {**dict.fromkeys(hit, value), **found}
    return {n: found[n] for n in names if n in found}


def matches(label: str, wanted: str | Iterable[str], model: nn.Module) -> Callable[[str], object]:
    """A function that says of a name whether it is one of those ``wanted``."""
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            return _linear_names(model).__contains__
        try:
            return re.compile(wanted).fullmatch
        except re.error as error:
            raise ValueError(f"{label}: expected a regular expression, got {wanted!r} ({error})") from None
    ends = list(wanted) if isinstance(wanted, Iterable) else [None]
    if not all(isinstance(end, str) for end in ends):
        raise TypeError(f"{label}: expected names of layers, or one regular expression, got {wanted!r}")
    return lambda n: any(n == end or n.endswith("." + end) for end in ends)


def _refuse_unmatched(label: str, wanted: str | Iterable[str], model: nn.Module) -> None:
    """Names of a list, or an expression that leaves layers out, of which no module is meant."""
    names = [n for n, _ in _walk(model) if n]
    if isinstance(wanted, str):
        alone = label == "exclude" and wanted.lower() != "all-linear"
        missed = [] if not alone or any(map(matches(label, wanted, model), names)) else [wanted]
    else:
        missed = [end for end in wanted if not any(map(matches(label, [end], model), names))]
    if missed:
        raise ValueError(f"{label}: expected names of layers, of which there are {_some(model)}, got {missed}")


def _listed(wanted: str | Iterable[str]) -> str | Iterable[str]:
    """Names that are gone through more than once; what is neither a text nor names is refused later."""
    return list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else wanted


def _some(model: nn.Module) -> str:
    return _shortened([n for n, m in modules_by_name(model).items() if n and refusal(frozen_module(m)) is None])


def _shortened(names: list[str]) -> str:
    return repr(names) if len(names) <= 8 else f"{names[:8]} and {len(names) - 8} more"


def _bypassed_children(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of layers whose weights are used without a call, with the type of the module that does so."""
    for prefix, parent in _walk(model):
        kind = type(frozen_module(parent))
        for path in bypassed(cast(Hashable, kind)):
            for n in _below(parent, path.split(".")):
                yield f"{prefix}.{n}" if prefix else n, kind.__name__


def _below(module: nn.Module, path: list[str]) -> Iterator[str]:
    """The names that a path stands for, where ``*`` is any child."""
    word, *rest = path
    for attr, child in frozen_module(unwrapped(module))._modules.items():
        if child is not None and word in ("*", attr):
            yield from [attr] if not rest else (f"{attr}.{n}" for n in _below(child, rest))


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    yield name, module
    for attr, child in frozen_module(module)._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{attr}" if name else attr)


def _linear_names(model: nn.Module) -> set[str]:
    """Every ``Linear`` and ``Conv1D`` but the output layer of a transformers model."""
    embeddings = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    return {n for n, m in modules_by_name(model).items() if _is_linear(frozen_module(m)) and m is not embeddings}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
