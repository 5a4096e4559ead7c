"""A Sphinx extension: addresses that lead elsewhere. ``/lame.html`` opens LAME's chapter, wherever its part is.

A page that moves gets a line in ``MOVED``, so that links from outside go on working.
"""

from __future__ import annotations

import html
from pathlib import Path

from sphinx.application import Sphinx

from peftref.catalog import METHODS

MOVED: dict[str, str] = {}  # old address -> new one, both seen from the root and without ".html"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Moved</title>
<link rel="canonical" href="{target}">
<meta http-equiv="refresh" content="0; url={target}">
</head>
<body><main><h1>Moved</h1><p>This page is now <a href="{target}">here</a>.</p></main></body>
</html>
"""


def addresses() -> dict[str, str]:
    """Short address -> page, both without the suffix."""
    return {m.slug: f"book/{m.part}/{m.slug}" for m in METHODS if m.status == "ready"} | MOVED


def write(app: Sphinx, error: Exception | None) -> None:
    """Write one small page for each address.

    Raises:
        ValueError: an address that leads nowhere, or would hide a page.
    """
    if error or app.builder.format != "html":
        return
    out = Path(app.outdir)
    for old, new in addresses().items():
        target, page = f"{new}.html", out / f"{old}.html"
        if not (out / target).is_file():
            continue  # a part of the book was built
        if page.is_file() and PAGE[:60] not in page.read_text(encoding="utf-8"):
            raise ValueError(f"redirects: {old}.html is a page of the book")
        up = "../" * old.count("/")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PAGE.format(target=html.escape(up + target)), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
