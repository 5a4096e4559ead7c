"""The catalogue as Markdown: the README's table, the book's map, its table of contents."""

from __future__ import annotations

from pathlib import Path

from peftref.catalog import METHODS, PARTS, Part
from tools import front, reference

ARXIV = "https://arxiv.org/abs/"
OVERVIEW = ("map", "results", "speed", "beyond")
REFERENCE = ("bibliography", "changelog", "status")  # after the pages of the modules


def rows(part: Part, book: str) -> list[str]:
    """A Markdown table of the ready methods of a part; ``book`` leads from the page to the book's folder."""
    lines = ["| Method | In one line, and the paper |", "|:--|:--|"]
    for method in METHODS:
        if method.part == part.slug and method.status == "ready":
            title = f"**[{method.title}]({book}{part.slug}/{method.slug}.ipynb)**"
            lines.append(f"| {title} | {method.summary}. [{method.reference}]({ARXIV}{method.arxiv}) |")
    return lines


def count() -> str:
    """How many methods are ready, in words."""
    ready = sum(method.status == "ready" for method in METHODS)
    return f"{ready} of {len(METHODS)} methods are ready."


def readme_table() -> str:
    """The README's table: the ready methods by part, then the planned ones in one sentence."""
    lines = [count(), ""]
    for part in _begun():
        lines += [f"### {part.title}: {part.adapts}", "", *rows(part, "book/"), ""]
    return "\n".join([*lines, front.planned()])


def map_page() -> str:
    """The book's map: what each part adapts, a table of its methods; then the planned ones in a short list."""
    lines = ["# Map of the book", "", f"What adapts, by which method. {count()}", ""]
    for part in _begun():
        lines += [f"## {part.title}", "", f"*{part.adapts[0].upper() + part.adapts[1:]}.*", "", *rows(part, ""), ""]
    lines += ["## Planned", ""]
    for part in PARTS:
        titles = [method.title for method in METHODS if method.part == part.slug and method.status == "planned"]
        if titles:
            lines.append(f"- {part.title} ({part.adapts}): {', '.join(titles)}")
    return "\n".join(lines) + "\n"


def _begun() -> list[Part]:
    ready = {method.part for method in METHODS if method.status == "ready"}
    return [part for part in PARTS if part.slug in ready]


def toc(root: Path) -> str:
    """``_toc.yml``: the chapters of the ready methods in the order of the catalogue, then every public module."""
    lines = ["# Written by `python -m tools.readme` from the catalogue and the modules.", "format: jb-book"]
    lines += ["root: book/intro", "parts:", *_caption("Overview", OVERVIEW, "book")]
    for part in PARTS:
        ready = [method for method in METHODS if method.part == part.slug and method.status == "ready"]
        slugs = [page for method in ready for page in (method.slug, *method.more)]
        index = ["index"] if (root / f"book/{part.slug}/index.ipynb").is_file() else []
        if slugs:
            lines += _caption(part.title, [*index, *slugs], f"book/{part.slug}", numbered=True)
    lines += ["  - caption: Reference", "    chapters:"]
    for top, modules in reference.tree(root).items():
        lines.append(f"      - file: book/api/{top}")
        if modules:
            lines.append("        sections:")
            lines += [f"          - file: book/api/{module.replace('.', '/')}" for module in modules]
    lines += [f"      - file: book/{page}" for page in REFERENCE]
    return "\n".join(lines) + "\n"


def _caption(title: str, pages: list[str] | tuple[str, ...], folder: str, *, numbered: bool = False) -> list[str]:
    head = [f"  - caption: {title}", *(["    numbered: true"] if numbered else []), "    chapters:"]
    return head + [f"      - file: {folder}/{page}" for page in pages]
