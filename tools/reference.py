"""The pages of the reference, one for each public module, and what stands on them that is not in a docstring.

A page holds one directive, ``module-page`` (:mod:`tools.linked`), so it does not change with the code. The part's own
page is written by hand; the pages below it by ``python -m tools.readme``.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from peftref.catalog import METHODS, PARTS
from tools import stubs

ROOT = Path(__file__).resolve().parents[1]
EQUATION = r"eq-[a-z0-9_]+(?:-[a-z0-9]+)+"
# Labels that pages have used before their module moved, so that old links go on working.
LABELS = {
    "adapters.core.injection": "adapters-core", "adapters.core.adapter": "adapters-contract",
    "adapters.core.files": "adapters-files", "adapters.core.host": "adapters-host",
    "adapters.baselines.lora": "lora", "adapters.core.spectra": "adapters-spectra",
    "adapters.core.activations": "adapters-inputs", "adapters.core.switch": "adapters-switch",
    "adapters.core.phm": "adapters-phm", "adapters.baselines.hyperformer": "adapters-hyperformer",
    "adapters.experiments.multitask": "adapters-multitask", "adapters.core.layers": "adapters-layers",
    "adapters.core.bypass": "adapters-bypass", "adapters.core.targets": "adapters-finding",
    "adapters.experiments.transfer": "adapters-tasks", "continual.core.balanced_norm": "adab2n-statistics",
    "continual.baselines.norms": "continual-norms", "continual.core.growing_head": "lae-head",
    "continual.core.small_modules": "continual-pet", "continual.core.prefix": "continual-prefix",
    "continual.core.lda": "lda", "continual.core.film": "film", "continual.core.streams": "continual-streams",
    "continual.core.metrics": "continual-metrics", "continual.core.replay": "continual-replay",
    "continual.baselines.rehearsal": "continual-rehearsal", "continual.baselines.ewc": "continual-ewc",
    "continual.core.train": "continual-train", "data.streams": "streams", "merging.core.loop": "merging-core",
    "merging.experiments.multicolor": "multicolor", "merging.baselines.arithmetic": "merging-arithmetic",
    "merging.baselines.ties": "merging-ties", "merging.core.checkpoints": "merging-checkpoints",
    "merging.core.batchnorm": "merging-batchnorm", "merging.core.units": "layers", "merging.core.patching": "patching",
    "merging.core.quantise": "quantise", "merging.experiments.corrupted": "corrupted",
    "merging.experiments.spurious": "spurious", "merging.experiments.colournets": "colournets",
    "panel.dml_panel": "dml-panel", "panel.core.estimators": "panel-information", "tta.baselines.tent": "tent",
    "tta.baselines.bn_adapt": "bn-adapt", "tta.core.views": "views", "tta.experiments.evaluate": "evaluate",
}  # fmt: skip
GROUPS = ("", "core", "baselines", "experiments")  # in this order on the pages of a part


class Constant(NamedTuple):
    """A public name that is no function and no class: its value as written, and the comment beside it."""

    name: str
    value: str
    comment: str


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module with public names but the recorded runs: dotted name without the package's own, and file."""
    found = {}
    for path in sorted((root / "peftref").rglob("*.py")):
        script = path.name.startswith(("_", "make_")) or "\nPRESETS" in path.read_text(encoding="utf-8")
        if stubs.names(path) and not script:
            found[".".join(path.relative_to(root / "peftref").with_suffix("").parts)] = path
    return found


def tree(root: Path = ROOT) -> dict[str, list[str]]:
    """The reference's top pages, each with the modules below it: methods in the book's order, then what they share."""
    slugs = [method.slug for method in METHODS]
    below: dict[str, list[str]] = {}
    for part in PARTS:
        if (root / f"book/api/{part.slug}.md").is_file():
            below[part.slug] = []
    below |= {"data": [], "shared": []}
    for name in modules(root):
        top = name.partition(".")[0]
        below[top if top in below and "." in name else "shared"].append(name)

    def order(name: str) -> tuple[bool, int, int, str]:
        steps = name.split(".")
        group = GROUPS.index(steps[1]) if len(steps) == 3 and steps[1] in GROUPS else 0
        return "." in name, group, slugs.index(steps[-1]) if steps[-1] in slugs else len(slugs), name

    return {top: sorted(names, key=order) for top, names in below.items()}


def label(name: str) -> str:
    """The label of a module's page: ``api-lame`` for a method."""
    steps = name.split(".")
    methods = {f"{method.part}.{method.slug}" for method in METHODS}
    plain = steps[-1] if name in methods or steps[0] in ("plots", "data") or len(steps) == 1 else "-".join(steps)
    return f"api-{LABELS.get(name, plain)}"


def pages(root: Path = ROOT) -> dict[Path, str]:
    """File and text of every page below the parts' own."""
    titles = {f"{method.part}.{method.slug}": f"{method.title}: " for method in METHODS}
    return {
        root / f"book/api/{name.replace('.', '/')}.md": (
            f"({label(name)})=\n# {titles.get(name, '')}`peftref.{name}`\n\n"
            f"```{{eval-rst}}\n.. module-page:: peftref.{name}\n```\n"
        )
        for name in modules(root)
    }


def source(name: str, root: Path = ROOT) -> Path:
    """The file of a module with its full name."""
    return root / f"{name.replace('.', '/')}.py"


def constants(path: Path) -> list[Constant]:
    """The constants in a module's ``__all__``, read without importing it, so nothing of this machine gets in."""
    text = path.read_text(encoding="utf-8")
    public = stubs.names(path)
    found = []
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(targets[0], ast.Name) and targets[0].id in public and value is not None:
            written = ast.unparse(value)
            comment = _comment(text.splitlines(), node.lineno, node.end_lineno or node.lineno)
            found.append(Constant(targets[0].id, written if len(written) <= 200 else "", comment))
    return found


def _comment(lines: list[str], first: int, last: int) -> str:
    """The comment at the end of an assignment, or in the lines right above it."""
    beside = re.search(r"\s#\s(.+)$", lines[last - 1]) or re.search(r"\s#\s(.+)$", lines[first - 1])
    if beside:
        return beside[1]
    above: list[str] = []
    while first > 1 and lines[first - 2].startswith("# "):
        first -= 1
        above.insert(0, lines[first - 1].removeprefix("# "))
    return " ".join(above)


@cache
def computed_by(root: Path = ROOT) -> dict[str, list[str]]:
    """For each equation label, the public functions and classes whose source names it."""
    found: dict[str, list[str]] = {}
    for name, path in modules(root).items():
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in stubs.names(path):
                for equation in dict.fromkeys(re.findall(EQUATION, ast.get_source_segment(text, node) or "")):
                    found.setdefault(equation, []).append(f"peftref.{name}.{node.name}")
    return found
