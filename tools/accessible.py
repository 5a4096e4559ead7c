"""A Sphinx extension: what docutils writes for bibliographies, in roles that screen readers know today.

``doc-biblioentry`` is deprecated in favour of a list item, and with it the list of citations had no items at all.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def roles(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Rewrite the roles in the body of one page."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", roles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
