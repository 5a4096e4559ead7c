"""The catalogue as Markdown: the README's table, the book's map, its table of contents."""

from __future__ import annotations

from pathlib import Path

from peftref.catalog import METHODS, PARTS, Part
from tools import reference

ARXIV = "https://arxiv.org/abs/"
OVERVIEW = ("map", "results", "speed", "status", "beyond")
REFERENCE = ("bibliography", "changelog")  # after the pages of the modules


def rows(part: Part, book: str) -> list[str]:
    """A Markdown table of one part; ``book`` leads from the page to the book's folder. Only ready methods are links."""
    lines = ["| Method | In one line, and the paper |", "|:--|:--|"]
    for method in METHODS:
        if method.part == part.slug:
            ready = method.status == "ready"
            title = f"**[{method.title}]({book}{part.slug}/{method.slug}.ipynb)**" if ready else method.title
            lines.append(f"| {title} | {method.summary}. [{method.reference}]({ARXIV}{method.arxiv}) |")
    return lines


def count() -> str:
    """How many methods are ready, in words."""
    ready = sum(method.status == "ready" for method in METHODS)
    return f"{ready} of {len(METHODS)} methods are ready: those in **bold**, which link to their chapter."


def readme_table() -> str:
    """The README's table: parts with a ready chapter in full, the others in one line each."""
    ready = {method.part for method in METHODS if method.status == "ready"}
    lines = [count(), ""]
    for part in (part for part in PARTS if part.slug in ready):
        lines += [f"### {part.title}: {part.adapts}", "", *rows(part, "book/"), ""]
    lines += ["### Planned", "", "| Part | What adapts | Methods |", "|:--|:--|:--|"]
    for part in (part for part in PARTS if part.slug not in ready):
        titles = ", ".join(method.title for method in METHODS if method.part == part.slug)
        lines.append(f"| {part.title} | {part.adapts} | {titles} |")
    return "\n".join(lines)


def map_page() -> str:
    """The book's map: a short table per part."""
    lines = ["# Map of the book", "", f"What adapts, by which method. {count()} The others are planned.", ""]
    for part in PARTS:
        lines += [f"## {part.title}", "", f"*{part.adapts[0].upper() + part.adapts[1:]}.*", "", *rows(part, ""), ""]
    return "\n".join(lines)


def toc(root: Path) -> str:
    """``_toc.yml``: the chapters of the ready methods in the order of the catalogue, then every public module."""
    lines = ["# Written by `python -m tools.readme` from the catalogue and the modules.", "format: jb-book"]
    lines += ["root: book/intro", "parts:", *_caption("Overview", OVERVIEW, "book")]
    for part in PARTS:
        slugs = [method.slug for method in METHODS if method.part == part.slug and method.status == "ready"]
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
