"""Write what follows from other files: the README's hero and table, the book's front page with its gallery, the map and
the table of contents from the catalogue, a page of the reference for each public module, the pages of results, of speed
and of the chapters' state, and what each chapter says of its length, from what was measured. A page of the reference
whose module is gone is deleted.

``--check`` only says whether they are up to date.

Run as ``python -m tools.readme``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from peftref._replacing import replacing
from tools import catalog_pages, front, pages, reference, speed, status, times

ROOT = Path(__file__).resolve().parents[1]
START, STOP = "<!-- catalog:start -->", "<!-- catalog:end -->"
HERO = front.PICTURE[0]


def filled(page: Path, content: Mapping[str, str]) -> bytes:
    """The content of a page with new text between the markers of each name, ``<!-- name:start -->`` and ``end``.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    text = page.read_text(encoding="utf-8")
    for name, new in content.items():
        start, stop = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != 1 or text.count(stop) != 1 or text.index(start) > text.index(stop):
            raise ValueError(f"{page.name}: expected {start} and then {stop}, once each")
        head, rest = text.split(start)
        text = f"{head}{start}\n\n{new}\n\n{stop}{rest.split(stop)[1]}"
    return text.encode()


def wanted(root: Path = ROOT) -> dict[Path, bytes]:
    """The content that each generated file should have.

    Raises:
        ValueError: a page does not have each of its markers once, in order.
    """
    readme = {"catalog": catalog_pages.readme_table()}
    intro = {"gallery": front.gallery(root)}
    files: dict[Path, bytes] = front.thumbs(root)
    if any(shown.name == front.PICTURE[1] for shown in front.figures(root / HERO)):  # else the old one stays
        readme["hero"] = front.readme_hero(root)
        intro["hero"] = front.book_hero(root)
        files[root / "book/_static/readme.png"] = front.picture(root).png
    files[root / "README.md"] = filled(root / "README.md", readme)
    if (root / "book/intro.md").is_file():
        files[root / "book/intro.md"] = filled(root / "book/intro.md", intro)
    files[root / "book/map.md"] = catalog_pages.map_page().encode()
    files |= {path: text.encode() for path, text in reference.pages(root).items()}
    toc = catalog_pages.toc(root)
    files[root / "_toc.yml"] = toc.encode()
    files[root / "book/results.md"] = pages.results_page(root).encode()
    files[root / "book/speed.md"] = speed.speed_page(root).encode()
    files[root / speed.CHART] = speed.chart(root)
    files[root / "book/status.md"] = status.status_page(root, toc).encode()
    files |= times.chapters(root)
    return files


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write what differs; with ``--check`` write nothing and return 1 when something differs."""
    stale = {path: data for path, data in wanted(root).items() if not path.is_file() or path.read_bytes() != data}
    for path, data in stale.items():
        if "--check" in arguments:
            print(f"{path.relative_to(root)} is out of date: run python -m tools.readme")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(data)
            print(f"wrote {path.relative_to(root)}")
    gone = [path for path in (root / "book/api").rglob("*/*.md") if path not in reference.pages(root)]
    for path in gone:
        print(f"{path.relative_to(root)} has no module any more")
        if "--check" not in arguments:
            path.unlink()
    return int(bool(stale or gone) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
