"""A Sphinx extension: the reference's pages, and links between an equation and the code that computes it, both ways.

A docstring says ``(eq-lame-update)``; its page links the equation of that label. Below the equation, the chapter links
the functions whose source names the label. And ``.. module-page:: peftref.tta.lame`` is a page of the reference: a
table of what is public, the module's docstring, every class and function, the constants.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Sphinx knows this folder only
from tools import reference, stubs  # noqa: E402

# What scikit-learn adds to every estimator, and an empty field of Matplotlib's style.
HIDDEN = ("set_fit_request", "set_predict_request", "set_score_request", "set")


class ModulePage(SphinxDirective):
    """``.. module-page:: peftref.tta.lame``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        node = nodes.container()
        lines = StringList(page(name), source=self.get_source_info()[0])
        self.state.nested_parse(lines, self.content_offset, node)
        return node.children


def page(name: str) -> list[str]:
    """The lines of a module's page, in reStructuredText."""
    path = reference.source(name)
    constants = reference.constants(path)
    known = {constant.name for constant in constants}
    lines = [f".. py:currentmodule:: {name}", ""]
    summaries = _summaries(path, known)
    if summaries:
        lines += [".. list-table::", "   :widths: 30 70", ""]
    for one, summary in summaries.items():
        text = [summary]
        link_equations(None, "", one, None, None, text)
        lines += [f"   * - :py:obj:`{one}`", f"     - {text[0]}"]
    lines += [""]
    hidden = ", ".join([*HIDDEN, *sorted(known)])
    lines += [f".. automodule:: {name}", "   :members:", f"   :exclude-members: {hidden}", ""]
    if constants:
        lines += [".. rubric:: Constants", ""]
    for constant in constants:
        lines += [f".. py:data:: {name}.{constant.name}"]
        lines += [f"   :value: {constant.value}"] if constant.value else []
        lines += ["", f"   {constant.comment[:1].upper()}{constant.comment[1:]}", ""]
    return lines


def _summaries(path: Path, leave_out: set[str]) -> dict[str, str]:
    """Public functions and classes in the order of the source, each with the first paragraph of its docstring."""
    public = set(stubs.names(path)) - leave_out
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
            found[node.name] = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return found


def link_equations(app: Sphinx | None, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make every label of an equation in a docstring a link to it."""

    def linked(found: re.Match[str]) -> str:
        return ", ".join(f":eq:`{label}`" for label in re.findall(reference.EQUATION, found[0]))

    escape_plain(lines)
    several = rf"\({reference.EQUATION}(?:, {reference.EQUATION})*\)"
    for i, line in enumerate(lines):
        # Inside displayed maths, \text{(eq-...)}, a role would be no link.
        alone = rf"(?<![`\w/-])(?<!\{{\(){reference.EQUATION}(?![`\w-])"
        lines[i] = re.sub(rf"(?<!\{{){several}|{alone}", linked, line)


def escape_plain(lines: list[str]) -> None:
    """Let bars and underscores of a formula in plain text, ``|v_|^2``, stand for themselves; in literals they do so."""
    block = -1  # how far the head of a literal or a formula is indented, inside one
    for i, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        if block >= 0 and line.strip() and depth <= block:
            block = -1
        if block < 0 and not re.match(r"\s*(\| |>>>|\.\.)", line):
            steps = re.split(r"(``.*?``|`.*?`)", line)
            lines[i] = "".join(
                s if s.startswith("`") else re.sub(r"(?<!\\)\||(?<=\w)_(?!\w)", r"\\\g<0>", s) for s in steps
            )
        if block < 0 and (line.strip().startswith(".. math::") or line.rstrip().endswith("::")):
            block = depth


def link_public(app: Sphinx, env: Any, node: pending_xref, content: nodes.Node) -> nodes.Node | None:
    """Where :func:`peftref.tta.LAME` leads: to the module that defines it."""
    _, _, short = node.get("reftarget", "").partition("peftref.")
    package, _, name = short.partition(".")
    home = _homes(package).get(name.partition(".")[0])
    if node.get("refdomain") != "py" or home is None:
        return None
    domain, target = env.get_domain("py"), f"peftref.{package}.{home}.{name}"
    found: nodes.Node | None = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)
    return found


@cache
def _homes(package: str) -> dict[str, str]:
    """Public name -> module, of a package with a stub."""
    stub = reference.ROOT / f"peftref/{package}/__init__.pyi"
    text = stub.read_text(encoding="utf-8") if package and stub.is_file() else ""
    return {name: module for module, name in re.findall(r"^from \.([\w.]+) import (\w+) as", text, re.M)}


def link_code(app: Sphinx, doctree: nodes.document) -> None:
    """Below each labelled equation, links to the functions that compute it."""
    for equation in list(doctree.findall(nodes.math_block)):
        names = reference.computed_by().get(equation.get("label") or "", [])
        if not names:
            continue
        line = nodes.paragraph("", "in code: ", classes=["in-code"])
        for i, name in enumerate(names):
            short = name.rpartition(".")[2]
            target = {"refdomain": "py", "reftype": "obj", "reftarget": name, "refexplicit": True}
            link = pending_xref("", nodes.literal("", short), refdoc=app.env.docname, refwarn=False, **target)
            line += [nodes.Text(", ")] * bool(i) + [link]
        equation.parent.insert(equation.parent.index(equation) + 1, line)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("module-page", ModulePage)
    app.connect("autodoc-process-docstring", link_equations, priority=400)  # before napoleon
    app.connect("missing-reference", link_public)
    app.connect("doctree-read", link_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
