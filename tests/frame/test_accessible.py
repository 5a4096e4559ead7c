"""Every page passes axe-core's checks of WCAG 2.1 A and AA in a real browser, those of its colours in both themes.

The checker looks at every element, and most elements are tokens of code and parts of equations. So equations stay TeX,
of tokens of a kind (same classes, all the way up) one is kept on each page, and colours are looked at once for each
kind of element in the whole book. ``WHOLE`` are pages that are checked as they are.
"""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

RUN = """options => axe.run('body', {resultTypes: ['violations'], ...options}).then(r => r.violations.flatMap(
  v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 160)} ${n.any[0]?.message ?? ''}`)))"""
RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
    "rules": {"color-contrast": {"enabled": False}, "link-in-text-block": {"enabled": False}},
}
COLOURS = {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}}
READY = """async () => {
  await window.MathJax?.startup?.promise;
  document.head.insertAdjacentHTML('beforeend', '<style>* {transition: none !important}</style>');
  document.querySelectorAll('details').forEach(d => { d.open = true; });
}"""
KIND = """const kind = e => {
  let path = e.getAttribute('style') ?? '';
  for (; e !== document.body; e = e.parentElement)
    path += ` ${e.tagName}.${e.className}` + (e.tagName === 'TR' ? e.rowIndex % 2 : '');
  return path;
}, single = e => e.textContent.trim().length === 1;"""  # the checker looks at no colour of a single character
TRIM = """() => { KIND
  const kinds = new Set();
  for (const e of document.querySelectorAll('.highlight pre span, dt.sig span, dt.sig em, code span'))
    if (single(e) || kinds.has(kind(e))) e.replaceWith(...e.childNodes); else kinds.add(kind(e));
  document.body.normalize();
}""".replace("KIND", KIND)
# Leaves the kinds that no page before has shown; of what is hidden it takes no note.
NEW = """seen => { KIND
  const kinds = new Set(seen);
  const shows = e => e.checkVisibility() && !single(e);
  const all = [...document.body.querySelectorAll(':not(script, style)')].map(e => [e, kind(e), shows(e)]);
  for (const [e, path, shown] of all.reverse())
    if (e.childElementCount === 0 && (!shown || kinds.has(path))) e.remove(); else if (shown) kinds.add(path);
  return [...kinds];
}""".replace("KIND", KIND)
STUBS = {
    "/tex-mml-chtml.js": b"""MathJax.startup = {promise: Promise.resolve()}; MathJax.typesetPromise = async () => {};
document.head.insertAdjacentHTML('beforeend', '<style>div.math {overflow: hidden !important}</style>');""",
    "/fontawesome/": b"",
}
WHOLE = ("book/beyond.html", "book/results.html")


@pytest.fixture(scope="module")
def axe() -> str:
    """The checker's script, as its package for Playwright has it."""
    return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


@contextmanager
def serve(folder: Path, *, whole: bool = False) -> Iterator[str]:
    """Serve the pages, unless whole without the scripts that set equations and draw icons.

    A route in the browser would do the same, and switch off its cache.
    """

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            stub = next((text for name, text in STUBS.items() if name in self.path), None)
            if whole or stub is None:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/javascript")
            self.end_headers()
            self.wfile.write(stub)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def violations(browser: Browser, folder: Path, axe: str, names: list[str], *, whole: bool = False) -> list[str]:
    bad: list[str] = []
    kinds: list[str] = []
    with serve(folder, whole=whole) as site, browser.new_context(color_scheme="light") as context:
        page = context.new_page()
        for name in names:
            page.goto(site + name, wait_until="load")
            page.evaluate(READY)
            views = page.locator("script[type='application/vnd.jupyter.widget-view+json']").count()
            if views:
                page.wait_for_function(f"document.querySelectorAll('.widget-subarea').length >= {views}")
            if not whole:
                page.evaluate(TRIM)
            page.evaluate(axe)
            bad += [f"{name}: {found}" for found in page.evaluate(RUN, RULES)]
            if not whole:
                kinds = page.evaluate(NEW, kinds)
            for theme in ("light", "dark"):
                page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
                bad += [f"{name}, {theme}: {found}" for found in page.evaluate(RUN, COLOURS)]
    return bad


def test_every_page(browser: Browser, axe: str, html: Path) -> None:
    names = [p.relative_to(html).as_posix() for p in sorted((html / "book").rglob("*.html"))]
    assert set(WHOLE) <= set(names)
    bad = violations(browser, html, axe, [*(name for name in names if name not in WHOLE), "search.html"])
    bad += violations(browser, html, axe, list(WHOLE), whole=True)
    assert not bad, "\n".join(bad[:40])
