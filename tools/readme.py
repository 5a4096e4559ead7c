"""Write what follows from other files: the README's table, the map and the table of contents from the catalogue, the
README's picture from a chapter, a page of the reference for each public module, the pages of results, of speed and of
the chapters' state from what was measured. A page of the reference whose module is gone is deleted.

``--check`` only says whether they are up to date.

Run as ``python -m tools.readme``.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import nbformat

from peftref._replacing import replacing
from tools import catalog_pages, pages, reference, speed, status

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ("book/tta/cotta.ipynb", "fig-cotta-result")  # the figure that the README shows
START, STOP = "<!-- catalog:start -->", "<!-- catalog:end -->"


def picture(root: Path = ROOT) -> bytes:
    """The PNG of the figure that the README shows, as the executed chapter holds it.

    Raises:
        ValueError: the chapter has no such figure among its outputs.
    """
    file, name = PICTURE
    for cell in nbformat.read(root / file, as_version=4).cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output["data"]["image/png"])
    raise ValueError(f"{file}: expected an executed cell with the figure {name!r}, found none")


def wanted(root: Path = ROOT) -> dict[Path, bytes]:
    """The content that each generated file should have.

    Raises:
        ValueError: the README does not have each marker once, in order.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(STOP) != 1 or text.index(START) > text.index(STOP):
        raise ValueError(f"README.md: expected {START} and then {STOP}, once each")
    head, rest = text.split(START)
    table = f"{START}\n\n{catalog_pages.readme_table()}\n\n{STOP}"
    files = {readme: (head + table + rest.split(STOP)[1]).encode()}
    files[root / "book/map.md"] = catalog_pages.map_page().encode()
    files |= {path: text.encode() for path, text in reference.pages(root).items()}
    files[root / "_toc.yml"] = catalog_pages.toc(root).encode()
    files[root / "book/results.md"] = pages.results_page(root).encode()
    files[root / "book/speed.md"] = speed.speed_page(root).encode()
    files[root / speed.CHART] = speed.chart(root)
    files[root / "book/status.md"] = status.status_page(root).encode()
    if (root / PICTURE[0]).is_file():
        files[root / "book/_static/readme.png"] = picture(root)
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
