"""A Sphinx extension: what the theme and docutils leave out for readers without a mouse or without a screen.

``doc-biblioentry`` is deprecated in favour of a list item, and with it the list of citations had no items at all. And a
table too wide for its place must be reached by the keyboard to be scrolled.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

REPLACE = {
    'role="doc-biblioentry"': 'role="listitem"',
    '<div class="pst-scrollable-table-container">': '<div class="pst-scrollable-table-container" tabindex="0">',
}


def rewrite(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Rewrite the body of one page."""
    for old, new in REPLACE.items():
        if "body" in context:
            context["body"] = context["body"].replace(old, new)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
