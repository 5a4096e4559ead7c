"""What the README and the book's front page show of the chapters: one result, and a gallery of their first figures.

Pictures, captions and alt texts are those of the executed chapters; the numbers come from the recorded run.
"""

from __future__ import annotations

import base64
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

from peftref._records import read
from peftref.catalog import METHODS, PARTS, Method

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ("book/tta/lame.ipynb", "fig-lame-stream")  # the figure that the README shows
CLAIM = ("tta/lame", "LAME rbf, batch 16, class-sorted: gain over the source")  # and the row beside it
THUMBS = "book/_static/thumbs"


class Shown(NamedTuple):
    """A figure of an executed chapter."""

    name: str
    png: bytes
    alt: str
    caption: str


def figures(file: Path) -> list[Shown]:
    """The named figures of a chapter that are among its outputs, in order."""
    return _figures(file, file.stat().st_mtime_ns) if file.is_file() else []


@cache
def _figures(file: Path, _: int) -> list[Shown]:
    found = []
    for cell in nbformat.read(file, as_version=4).cells:
        shown = cell.metadata.get("mystnb", {})
        name = shown.get("figure", {}).get("name")
        pictures = [o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if name and pictures:
            alt = _plain(shown.get("image", {}).get("alt", ""))
            found.append(Shown(name, base64.b64decode(pictures[0]), alt, _plain(shown["figure"].get("caption", ""))))
    return found


def picture(root: Path = ROOT) -> Shown:
    """The figure that the README shows, as the executed chapter holds it.

    Raises:
        ValueError: the chapter has no such figure among its outputs.
    """
    file, name = PICTURE
    for shown in figures(root / file):
        if shown.name == name:
            return shown
    raise ValueError(f"{file}: expected an executed cell with the figure {name!r}, found none")


def sentence(root: Path = ROOT) -> str:
    """The result in numbers; nothing before it is recorded."""
    name, claim = CLAIM
    records = read(name, root / "peftref/recorded", missing_ok=True)
    if "cpu" not in records:
        return ""
    found = records["cpu"]
    row = found[claim]
    source, ours = row["level"].values()
    kinds = ", ".join(kind.replace("_", " ") for kind, _ in found.protocol["domains"])
    gain = f"{row['ours']:.1f} points, 95 % interval {row['low']:.1f} to {row['high']:.1f}, {row['seeds']} seeds"
    count = len(found.protocol["domains"])
    return (
        f"Over {count} kinds of photographs ({kinds}) LAME lowers the error from {source:.1f} to {ours:.1f} % ({gain})."
    )


def readme_hero(root: Path = ROOT) -> str:
    """Picture and caption for the README."""
    shown = picture(root)
    return f"![{shown.alt}](book/_static/readme.png)\n\n*{shown.caption}* {sentence(root)}".rstrip()


def book_hero(root: Path = ROOT) -> str:
    """The same for the front page of the book."""
    shown = picture(root)
    head = ["```{figure} _static/readme.png", f":alt: {shown.alt}", ":class: dark-light", ""]
    return "\n".join([*head, f"{shown.caption} {sentence(root)} {{doc}}`The chapter <tta/lame>`.", "```"])


def gallery(root: Path = ROOT) -> str:
    """A card for each ready method, with its first figure, by part; then the planned ones in one list."""
    lines = []
    for part in PARTS:
        ready = [method for method in METHODS if method.part == part.slug and method.status == "ready"]
        if ready:
            lines += [f"### {part.title}", "", f"*{part.adapts[0].upper() + part.adapts[1:]}.*", ""]
            lines += ["::::{grid} 1 2 2 3", ":gutter: 2", ""]
            for method in ready:
                lines += _card(method, root)
            lines += ["::::", ""]
    return "\n".join([*lines, planned()])


def planned() -> str:
    """The titles of the methods without a chapter, in one sentence."""
    titles = [method.title for method in METHODS if method.status == "planned"]
    return f"Planned: {', '.join(titles)}." if titles else ""


def thumbs(root: Path = ROOT) -> dict[Path, bytes]:
    """The first figure of each executed chapter of a ready method."""
    found: dict[Path, bytes] = {}
    for method in METHODS:
        shown = figures(root / f"book/{method.part}/{method.slug}.ipynb") if method.status == "ready" else []
        if shown:
            found[root / THUMBS / f"{method.slug}.png"] = shown[0].png
    return found


def _card(method: Method, root: Path) -> list[str]:
    shown = figures(root / f"book/{method.part}/{method.slug}.ipynb")
    image: list[Any] = []
    if shown:
        image = [f":img-top: _static/thumbs/{method.slug}.png", f":img-alt: {shown[0].alt}"]
        image.append(":class-img-top: dark-light")
    link = [f":link: {method.part}/{method.slug}", ":link-type: doc"]
    text = [f"{method.summary}.", "", "```{card-footer}", method.reference, "```"]
    return [f":::{{grid-item-card}} {method.title}", *link, *image, "", *text, ":::", ""]


def _plain(text: str) -> str:
    """Without MyST's roles and line breaks."""
    return " ".join(re.sub(r"\{[\w:]+\}`([^`<]*?)(?: <[^>]*>)?`", r"\1", text).split())
