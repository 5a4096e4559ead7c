"""Every method of the book: what it is called, where it comes from, and whether its chapter is ready.

The rows are those of ``catalog.toml``, in the order of the book. The README's table, the book's map and its table of
contents are written from here (``python -m tools.readme``), and the tests hold each ready method to its five places:
module, tests, chapter, benchmark, bibliography.

>>> [method.title for method in METHODS if method.part == "tta"]
['LAME', 'CoTTA', 'Label shift adapter']
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["METHODS", "PARTS", "Method", "Part", "table"]


@dataclass(frozen=True)
class Part:
    """A part of the book: one folder of the package, the book, the tests and the benchmarks."""

    slug: str
    title: str
    adapts: str


@dataclass(frozen=True)
class Method:
    """One method; ``slug`` also names its module, chapter, tests, benchmark and BibTeX entry.

    ``more`` are further pages of its chapter, in the same folder of the book.
    """

    slug: str
    part: str
    title: str
    summary: str
    authors: str
    venue: str
    year: int
    arxiv: str
    status: Literal["ready", "planned"] = "planned"
    more: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """Authors and venue as text: "Boudiaf et al., CVPR 2022"."""
        return f"{self.authors}, {self.venue} {self.year}"


def _read() -> tuple[tuple[Part, ...], tuple[Method, ...]]:
    content = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    methods = tuple(Method(**row | {"more": tuple(row.get("more", ()))}) for row in content["method"])
    return tuple(Part(**row) for row in content["part"]), methods


PARTS, METHODS = _read()


def table() -> pd.DataFrame:
    """One row per method, indexed by slug, in the order of the book.

    >>> table().groupby("part", sort=False).size().to_dict()["tta"]
    3
    """
    rows = [asdict(method) | {"reference": method.reference} for method in METHODS]
    return pd.DataFrame(rows).set_index("slug")
