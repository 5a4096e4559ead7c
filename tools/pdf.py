"""Print the built pages, each into a PDF of its own, in ``_build/pdf``: ``python -m tools.pdf [book/tta/lame ...]``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

HTML = Path(__file__).resolve().parents[1] / "_build" / "html"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Equations are set, pictures are loaded, and what is folded is open: paper cannot be clicked.
READY = """async () => {
  await window.MathJax?.startup?.promise;
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  for (const image of document.images) { image.loading = 'eager'; await image.decode().catch(() => {}); }
}"""
FOOTER = """<div style="font-size: 8px; width: 100%; text-align: center">
<span class="title"></span> · <span class="pageNumber"></span>/<span class="totalPages"></span></div>"""


def save(page: Page, source: Path, target: Path) -> None:
    """Open one built page and print it."""
    page.goto(source.as_uri(), wait_until="load")
    page.evaluate(READY)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.pdf(path=target, format="A4", scale=0.8, print_background=True, outline=True, tagged=True,
             display_header_footer=True, header_template="<i></i>", footer_template=FOOTER,
             margin={"top": "15mm", "bottom": "15mm", "left": "15mm", "right": "15mm"})  # fmt: skip


def main(names: Sequence[str] = (), html: Path = HTML, out: Path = HTML.parent / "pdf") -> list[Path]:
    """Print pages, all of the book where none is named.

    Raises:
        ValueError: a page that is not there.
    """
    from playwright.sync_api import sync_playwright

    pages = [html / f"{name}.html" for name in names] or sorted((html / "book").rglob("*.html"))
    if not pages or (missing := [page for page in pages if not page.is_file()]):
        raise ValueError(f"names: expected pages that are built, such as book/tta/lame; got {missing if pages else []}")
    printed = []
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, CHROMIUM)), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(color_scheme="light")  # paper is white
        for source in pages:
            target = out / source.relative_to(html).with_suffix(".pdf")
            save(page, source, target)
            printed.append(target)
        browser.close()
    return printed


if __name__ == "__main__":
    try:
        print(*main(sys.argv[1:]), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
