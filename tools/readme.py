"""Write the README's table of methods and the book's map from the catalogue; ``--check`` only says whether they are.

Run as ``python -m tools.readme``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peftref import catalog

ROOT = Path(__file__).resolve().parents[1]
START, STOP = "<!-- catalog:start -->", "<!-- catalog:end -->"


def wanted(root: Path = ROOT) -> dict[Path, str]:
    """The text that each generated file should have.

    Raises:
        ValueError: the README does not have each marker once, in order.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(STOP) != 1 or text.index(START) > text.index(STOP):
        raise ValueError(f"README.md: expected {START} and then {STOP}, once each")
    head, rest = text.split(START)
    table = f"{START}\n\n{catalog.readme_table()}\n\n{STOP}"
    return {readme: head + table + rest.split(STOP)[1], root / "book" / "map.md": catalog.map_page()}


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write what differs; with ``--check`` write nothing and return 1 when something differs."""
    stale = {path: text for path, text in wanted(root).items() if not path.is_file() or path.read_text("utf-8") != text}
    for path, text in stale.items():
        if "--check" in arguments:
            print(f"{path.relative_to(root)} is not what the catalogue says: run python -m tools.readme")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(root)}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
