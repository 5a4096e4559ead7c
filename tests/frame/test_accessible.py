"""Every page passes axe-core's checks of WCAG 2.1 A and AA in a real browser; the dark theme on a sample of kinds."""

from __future__ import annotations

import functools
import http.server
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools import vendor

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HASH = "sha512-Xm7bpRXnDSX2YE2YFfBk2FnF0ep6tmG7xPh8iHee8MIcrgq762Nkce856dYtJYLkuIoYZvGfTs/PbZhideTcEg=="  # noqa: E501
AXE = vendor.Package("axe-core", "4.10.3", HASH, {})
RUN = """() => axe.run('body', {resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})
  .then(r => r.violations.flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 160)}`)))"""
READY = """async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  document.querySelectorAll('details').forEach(d => { d.open = true; });
}"""
DARK = ("book/tta/lame.html", "book/map.html", "book/results.html", "book/api/tta.html")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checker's script, from npm, verified."""
    folder = tmp_path_factory.mktemp("axe")
    with tarfile.open(vendor.fetch(AXE, folder)) as tar:
        found = tar.extractfile("package/axe.min.js")
        assert found
        return found.read().decode()


@pytest.fixture(scope="module")
def site(html: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def violations(browser: Browser, site: str, axe: str, names: list[str], theme: Any) -> list[str]:
    bad = []
    with browser.new_context(color_scheme=theme) as context:
        page = context.new_page()
        for name in names:
            page.goto(site + name, wait_until="load")
            page.evaluate(READY)
            views = page.locator("script[type='application/vnd.jupyter.widget-view+json']").count()
            if views:
                page.wait_for_function(f"document.querySelectorAll('.widget-subarea').length >= {views}")
            page.evaluate(axe)
            bad += [f"{name} ({theme}): {found}" for found in page.evaluate(RUN)]
    return bad


def test_every_page(browser: Browser, site: str, axe: str, html: Path) -> None:
    names = [p.relative_to(html).as_posix() for p in sorted((html / "book").rglob("*.html"))]
    bad = violations(browser, site, axe, [*names, "search.html"], "light")
    bad += violations(browser, site, axe, [name for name in DARK if name in names], "dark")
    assert not bad, "\n".join(bad[:40])


def test_the_gate_can_fail(browser: Browser, site: str, axe: str, html: Path) -> None:
    (html / "bad.html").write_text("<html lang='en'><title>t</title><body><main><img src='x.png'></main></body></html>")
    try:
        assert any("image-alt" in found for found in violations(browser, site, axe, ["bad.html"], "light"))
    finally:
        (html / "bad.html").unlink()
