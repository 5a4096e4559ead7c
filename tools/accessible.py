"""A Sphinx extension: what the theme and docutils leave out for readers without a mouse or without a screen.

``doc-biblioentry`` is deprecated in favour of a list item, and with it the list of citations had no items at all. And a
table too wide for its place must be reached by the keyboard to be scrolled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from peftref._replacing import replace_text

REPLACE = {
    'role="doc-biblioentry"': 'role="listitem"',
    '<div class="pst-scrollable-table-container">': '<div class="pst-scrollable-table-container" tabindex="0">',
}


def rewrite(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Rewrite the body of one page."""
    for old, new in REPLACE.items():
        if "body" in context:
            context["body"] = context["body"].replace(old, new)


# The theme draws these around the body: a fold of the table of contents shows an icon and says nothing.
FOLD = '<summary><span class="toctree-toggle" role="presentation">'
NAMED = '<summary aria-label="Pages below"><span class="toctree-toggle" role="presentation">'


def name_folds(app: Sphinx, error: Exception | None) -> None:
    """Name the folds in the table of contents of every page."""
    if error or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        if FOLD in text:
            replace_text(path, text.replace(FOLD, NAMED))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", rewrite)
    app.connect("build-finished", name_folds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
