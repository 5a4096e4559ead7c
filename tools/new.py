"""Begin a method, or a part: every file that it needs, from ``tools/template``, in a form that passes every test.

``make method NAME=merging/widen`` (``python -m tools.new merging/widen``) writes the module, tests, naive twin, seeded
defects, bad calls, experiment, benchmark, chapter and BibTeX entry, and marks the catalogue's row as ready (it adds the
row if there is none); then it records the experiment, executes the chapter, tries the defects, and writes what follows
from these. What stands there is a toy that mixes probabilities: replace it, from the module on, and look for ``TODO``.

``make part NAME=sharing`` (``python -m tools.new --part sharing``) makes the folders of a part. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import nbformat

from peftref._replacing import replace_text
from peftref.catalog import METHODS, PARTS, Method

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).with_name("template")
ROOMS = {"core": "What the methods of this part are made of and share.",
         "baselines": "Published methods without a chapter.",
         "experiments": "Recorded runs, and what several of them share."}  # fmt: skip
METHOD_FILES = {
    "peftref/@part@/@slug@.py": "module.py",
    "peftref/@part@/experiments/@slug@.py": "experiment.py",
    "tests/@part@/test_@slug@.py": "test.py",
    "tests/_naive/@slug@.py": "naive.py",
    "tests/mutants/@slug@.toml": "mutants.toml",
    "benchmarks/@part@/bench_@slug@.py": "bench.py",
}
PART_FILES = {
    "peftref/@part@/__init__.py": "part_init.py",
    "tests/@part@/calls.py": "calls.py",
    "book/api/@part@.md": "part_api.md",
}


def filled(template: str, words: dict[str, str]) -> str:
    """The text of a template, with ``@word@`` replaced."""
    text = (TEMPLATES / f"{template}.tmpl").read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda found: words[found[1]], text)


def write(root: Path, files: dict[str, str], words: dict[str, str]) -> None:
    """New files; if one of them is there already, none is written.

    Raises:
        ValueError: a file is there.
    """
    paths = {re.sub(r"@(\w+)@", lambda f: words[f[1]], path): template for path, template in files.items()}
    there = [path for path in paths if (root / path).exists()]
    if there:
        raise ValueError(f"NAME: expected something new, but there is {', '.join(there)}")
    for path, template in paths.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(filled(template, words), encoding="utf-8")


def part(name: str, root: Path = ROOT) -> None:
    """The folders of a part, and its row in the catalogue if there is none.

    Raises:
        ValueError: no name for a package, or the part is there.
    """
    if not name.isidentifier() or not name.islower():
        raise ValueError(f"NAME: expected a part such as sharing, got {name!r}")
    known = {one.slug: one for one in PARTS}
    title = known[name].title if name in known else name.replace("_", " ").capitalize()
    adapts = known[name].adapts if name in known else "TODO: what adapts"
    words = {"part": name, "Title": title, "adapts": adapts}
    write(root, PART_FILES, words)
    for room, text in ROOMS.items():
        (root / f"peftref/{name}/{room}").mkdir()
        (root / f"peftref/{name}/{room}/__init__.py").write_text(f'"""{text}"""\n', encoding="utf-8")
    if name not in known:
        catalogue = root / "peftref/catalog.toml"
        head, first, rest = catalogue.read_text(encoding="utf-8").partition("[[method]]")
        replace_text(catalogue, head + filled("part.toml", words) + first + rest)


def method(name: str, root: Path = ROOT) -> None:
    """All files of a method.

    Raises:
        ValueError: not the name of a method in a part that has been begun, or a file of it is there.
    """
    where, _, slug = name.partition("/")
    if not slug.isidentifier() or not slug.islower() or not (root / f"tests/{where}/calls.py").is_file():
        raise ValueError(f"NAME: expected a part that is there and a method, such as merging/widen, got {name!r}")
    row = next((m for m in METHODS if m.slug == slug), None)
    if row is not None and row.part != where:
        raise ValueError(f"NAME: {slug} stands in the catalogue under {row.part}, got {where!r}")
    new = Method(
        slug, where, slug.replace("_", " ").capitalize(), "TODO: in one line", "TODO", "arXiv", 2024, "2401.00000"
    )
    one = row or new
    camel = "".join(word.capitalize() for word in slug.split("_"))
    words = {
        "slug": slug,
        "part": where,
        "Class": camel,
        "Title": one.title,
        "Authors": one.authors,
        "arxiv": one.arxiv,
    }
    words |= {"summary": one.summary, "venue": one.venue, "year": str(one.year)}
    chapter = root / f"book/{where}/{slug}.ipynb"
    if chapter.exists():
        raise ValueError(f"NAME: expected something new, but there is {chapter.relative_to(root)}")
    write(root, METHOD_FILES, words)
    chapter.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook(words), chapter)
    _insert(root / f"tests/{where}/calls.py", "CALLS: dict[str, Callable[[], Call]] = {\n", filled("calls", words))
    _import(root / f"tests/{where}/calls.py", ("Call", "mlp", "t"))
    with (root / "book/references.bib").open("a", encoding="utf-8") as references:
        references.write(filled("reference.bib", words))
    _ready(root / "peftref/catalog.toml", one, None if row else filled("catalog.toml", words))


def notebook(words: dict[str, str]) -> nbformat.NotebookNode:
    """The chapter: blocks of ``chapter.tmpl``, and the first cell from CONTRIBUTING."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    first = re.search(r"^## The first cell.*?```python\n(.*?)\n```", guide, re.S | re.M)
    assert first
    nb = nbformat.v4.new_notebook()
    for block in filled("chapter", words).split("%% ")[1:]:
        head, _, text = block.partition("\n")
        options = dict(option.split("=") for option in head.split()[1:])
        if head.startswith("markdown"):
            nb.cells.append(nbformat.v4.new_markdown_cell(text.strip()))
            continue
        metadata = {"tags": [options["tags"]]} if "tags" in options else {}
        if "name" in options:
            figure = {"caption": "TODO: what the figure shows.", "name": f"fig-{words['slug']}-{options['name']}"}
            image = {"alt": f"TODO: describe this picture of {words['Title']}", "classes": "dark-light"}
            metadata["mystnb"] = {"image": image, "figure": figure}
        if head == "first":
            text, metadata = first[1], {"tags": ["hide-cell"]}
        nb.cells.append(nbformat.v4.new_code_cell(text.strip(), metadata=metadata))
    return nb


def finish(*names: str) -> int:
    """What is computed from the files: public names, records, executed chapters, defects, written pages."""
    from peftref.recording import record
    from tools import chapters, mutants, readme, stubs

    stubs.main([])
    for name in names:
        for size in ("smoke", "cpu"):
            record(name, size, write=True)
    failed = chapters.main([*names, "--jobs", str(len(names))])
    for name in names:
        failed = failed or mutants.main(["--slug", name.partition("/")[2]])
    return failed or readme.main([])


def _insert(path: Path, after: str, text: str) -> None:
    found = path.read_text(encoding="utf-8")
    if found.count(after) != 1:
        raise ValueError(f"{path}: expected {after!r} once, got it {found.count(after)} times")
    replace_text(path, found.replace(after, after + text))


def _import(path: Path, names: tuple[str, ...]) -> None:
    """The names from ``tests.frame._inputs``, added to those that the file imports already."""
    text = path.read_text(encoding="utf-8")
    line = re.search(r"^from tests\.frame\._inputs import (\([^)]*\)|.*)$", text, re.M)
    assert line, path
    known = re.findall(r"\w+", line[1])
    every = sorted({*known, *names}, key=lambda n: (not n[0].isupper(), n))
    whole = f"from tests.frame._inputs import {', '.join(every)}"
    if len(whole) > 120:
        whole = "from tests.frame._inputs import (\n" + "".join(f"    {n},\n" for n in every) + ")"
    replace_text(path, text.replace(line[0], whole))


def _ready(path: Path, one: Method, row: str | None) -> None:
    """Mark a row of the catalogue as ready, or add it behind the last one of its part."""
    text = path.read_text(encoding="utf-8")
    blocks = text.rstrip().split("\n\n")
    if row is None:
        at = next(i for i, block in enumerate(blocks) if f'\nslug = "{one.slug}"' in block and "[[method]]" in block)
        if 'status = "ready"' not in blocks[at]:
            blocks[at] += '\nstatus = "ready"'
    else:
        same = [i for i, block in enumerate(blocks) if f'\npart = "{one.part}"' in block]
        blocks.insert(same[-1] + 1 if same else len(blocks), row.strip() + '\nstatus = "ready"')
    replace_text(path, "\n\n".join(blocks) + "\n")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.new", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", metavar="NAME", help="part/slug, for example merging/widen; with --part, a part")
    parser.add_argument("--part", action="store_true", help="begin a part")
    parser.add_argument("--finish", action="store_true", help="only compute what follows from the files")
    args = parser.parse_args(argv)
    if args.finish:
        return finish(args.name)
    try:
        (part if args.part else method)(args.name, root)
    except ValueError as error:
        parser.error(str(error))
    tool = ["tools.stubs"] if args.part else ["tools.new", "--finish", args.name]  # another process sees the new files
    return subprocess.run([sys.executable, "-m", *tool], cwd=root).returncode


if __name__ == "__main__":
    sys.exit(main())
