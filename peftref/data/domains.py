"""Domains: a corruption by its name, ``"clean"``, or any function ``(x, generator) -> x``; what streams are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import corruptions

__all__ = ["Domain", "domain_name", "domain_names", "generator_for", "shift"]

Domain = str | Callable[[Tensor, torch.Generator], Tensor]


def shift(x: Tensor, domain: Domain, severity: int, generator: torch.Generator, table: str) -> Tensor:
    """``x`` as it looks in ``domain``; ``"clean"`` is ``x`` itself."""
    if domain == "clean":
        return x
    if isinstance(domain, str):
        return corruptions.corrupt(x, domain, severity, generator=generator, table=table)
    out = domain(x, generator)
    if not isinstance(out, Tensor) or out.shape != x.shape or out.dtype != x.dtype:
        got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"domains: expected {domain_name(domain)} to return {x.dtype} {tuple(x.shape)}, got {got}")
    return out


def domain_names(domains: Sequence[Domain]) -> tuple[str, ...]:
    """Names of ``domains``, once they are known to be known and all different."""
    known = ("clean", *corruptions.CORRUPTIONS, *corruptions.EXTRA)
    names = tuple(domain_name(domain) for domain in domains)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"domains: expected at least one, each once (see cycles), got {names}")
    if unknown := [d for d in domains if isinstance(d, str) and d not in known]:
        raise ValueError(f"domains: expected names out of {', '.join(known)}, or functions, got {unknown[0]!r}")
    return names


def domain_name(domain: Domain) -> str:
    """The name itself, or that of the function."""
    if isinstance(domain, str):
        return domain
    if callable(domain) and hasattr(domain, "__name__"):
        return str(domain.__name__)
    raise TypeError(f"domains: expected a name or a function with a __name__, got {domain!r}")


def generator_for(*key: object) -> torch.Generator:
    """A generator of its own for every key: nearby seeds and segments share no random numbers.

    It lives on the CPU, so a stream is the same wherever its images are.
    """
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(seed >> 1)
