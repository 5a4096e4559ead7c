"""Seeded defects: for each of them at least one test must fail.

``tests/mutants/<slug>.toml`` lists the defects of a method, mistakes that one could make and that run happily; a file
named after a part, those of the mathematics that its methods share::

    [[mutant]]
    what = "the strength is dropped"          # in one line
    old = 'alpha=strength)'                   # occurs once in the file
    new = 'alpha=1.0)'
    file = "peftref/tta/lame.py"              # if not the method's module
    tests = ["tests/tta/test_lame.py"]        # if not those of that module

Each is put into a copy of the tree, never into the tree itself, and the tests are run there until one fails::

    python -m tools.mutants --jobs 2        # all methods; writes book/_results/mutants.json
    python -m tools.mutants --slug lame     # of one method or part
    python -m tools.mutants --check         # run nothing: are the lists up to date?

The exit code is 1 if a mutant survives, or is none: a text that has changed, tests that cannot be collected.
"""

from __future__ import annotations

import argparse
import ast
import json
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from peftref._replacing import replace_text
from peftref.catalog import METHODS, PARTS
from tools.forked import Forked

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings its predecessor
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LISTS, RECORD = "tests/mutants", "book/_results/mutants.json"
NOT_COPIED = "book/"  # no test of a module reads it, and it is large


@dataclass(frozen=True)
class Mutant:
    """One defect: ``new`` in place of ``old`` in ``file``, which one of ``tests`` must notice.

    With ``breaks_import`` it counts as noticed, too, that the tests cannot even be collected.
    """

    slug: str
    what: str
    old: str
    new: str
    file: str
    tests: tuple[str, ...]
    breaks_import: bool = False


class Verdict(NamedTuple):
    """``status`` is "killed", "survived" or "invalid"; ``by`` the test that failed, or why there is no verdict."""

    status: str
    by: str


def lists(root: Path = ROOT) -> list[str]:
    """What has a list: methods in the catalogue's order, then parts."""
    names = [method.slug for method in METHODS] + [part.slug for part in PARTS]
    return [name for name in names if (root / LISTS / f"{name}.toml").is_file()]


def load(slug: str, root: Path = ROOT) -> list[Mutant]:
    """The mutants of a method, or of what the methods of a part share.

    Raises:
        ValueError: a field that is missing or unknown, or two mutants of one name.
    """
    part = {method.slug: method.part for method in METHODS}.get(slug, slug)
    path = root / LISTS / f"{slug}.toml"
    found = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
        entry = {"file": f"peftref/{part}/{slug}.py", **entry}
        entry = {"tests": [f"tests/{part}/test_{Path(entry['file']).stem}.py"], **entry}
        try:
            found.append(Mutant(slug, **{**entry, "tests": tuple(entry["tests"])}))
        except TypeError as error:
            raise ValueError(f"{path.name}: expected the fields of a Mutant, {error}; got {sorted(entry)}") from None
    names = [mutant.what for mutant in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{path.name}: expected different names, got {sorted(n for n in names if names.count(n) > 1)}")
    return found


def mutated(mutant: Mutant, text: str) -> str:
    """The source with the defect in it.

    Raises:
        ValueError: the old text is not there exactly once, nothing changes, or the result is no Python.
    """
    where = f"{LISTS}/{mutant.slug}.toml is out of date: {mutant.what!r}: "
    if (times := text.count(mutant.old)) != 1:
        raise ValueError(f"{where}expected its old text once in {mutant.file}, got it {times} times")
    new = text.replace(mutant.old, mutant.new)
    if new == text:
        raise ValueError(f"{where}expected a new text that differs from the old one")
    try:
        ast.parse(new)
    except SyntaxError as error:
        raise ValueError(f"{where}expected Python, got {error}") from None
    return new


def outdated(mutants: Iterable[Mutant], root: Path = ROOT) -> list[str]:
    """What is wrong with the lists; nothing if they fit the tree."""
    problems = []
    for mutant in mutants:
        try:
            mutated(mutant, (root / mutant.file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return problems


def copy_tree(to: Path, root: Path = ROOT) -> None:
    """All files that git knows or would add, without the book."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(git, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and not name.startswith(NOT_COPIED) and (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, to / name)


@contextmanager
def applied(mutant: Mutant, tree: Path) -> Iterator[None]:
    """The defect in a copy, for as long as the block lasts."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    _write(path, mutated(mutant, text))
    try:
        yield
    finally:
        _write(path, text)


def _write(path: Path, text: str) -> None:
    """Without what Python compiled: a mutant may have the size and, to the second, the age of the text before it."""
    path.write_text(text, encoding="utf-8")
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


def judge(mutant: Mutant, runner: Forked, timeout: float, first: str = "") -> Verdict:
    """Run the tests on a mutant; ``first`` the one that noticed it last time, which mostly settles it in seconds.

    Only a test that fails kills. What takes too long has no verdict: the machine may be slow.
    """
    with applied(mutant, runner.tree):
        if first and runner.pytest([first], timeout)[0] == 1:  # or it passes, or there is no such test any more
            return Verdict("killed", first)
        code, out = runner.pytest(mutant.tests, timeout)
    failed = re.search(r"^(?:FAILED|ERROR) ([^\[\n]+?)(?:\[.*| - .*)?$", out, re.M)
    if code == 1 or code == 2 and mutant.breaks_import:
        return Verdict("killed", failed[1] if failed else "")
    if code == 0:
        return Verdict("survived", "")
    return Verdict("invalid", f"pytest: {'timeout' if code is None else f'exit code {code}'}: {out[-800:].strip()}")


def run(
    mutants: Sequence[Mutant], root: Path = ROOT, *, jobs: int = 1, timeout: float = 600,
    first: dict[tuple[str, str], str] | None = None,
) -> dict[Mutant, Verdict]:  # fmt: skip
    """The verdict on each mutant.

    Args:
        mutants: to judge.
        root: the tree, which is only read.
        jobs: at the same time, each in a copy of its own.
        timeout: of one run of the tests, in seconds.
        first: (slug, what) -> the test to begin with.

    Raises:
        RuntimeError: the tests fail without any mutant.
    """
    runners: queue.Queue[Forked] = queue.Queue()
    suites = list(dict.fromkeys(mutant.tests for mutant in mutants))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-"))).resolve()
        for i in range(jobs):
            copy_tree(folder / str(i), root)
            runners.put(runner := Forked(folder / str(i)))
            stack.callback(runner.close)
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        bar = stack.enter_context(tqdm(total=len(suites) + len(mutants), unit="run", disable=None))

        def lent(job: Callable[[Any, Forked], Any], what: Any) -> Any:
            runner = runners.get()
            try:
                return job(what, runner)
            finally:
                runners.put(runner)
                bar.update()

        def broken(tests: tuple[str, ...], runner: Forked) -> str:
            code, out = runner.pytest(tests, timeout)
            return "" if code == 0 else f"{' '.join(tests)}: {out[-2000:]}"

        def verdict(mutant: Mutant, runner: Forked) -> Verdict:
            return judge(mutant, runner, timeout, (first or {}).get((mutant.slug, mutant.what), ""))

        if problems := [*filter(None, pool.map(partial(lent, broken), suites))]:
            raise RuntimeError("expected tests that pass on the tree as it is, got\n" + "\n".join(problems))
        return dict(zip(mutants, pool.map(partial(lent, verdict), mutants), strict=True))


def summary(verdicts: dict[Mutant, Verdict]) -> dict[str, dict[str, Any]]:
    """By list: how many were killed, of how many, and each with the test that noticed it."""
    found: dict[str, dict[str, Any]] = {}
    for mutant, verdict in verdicts.items():
        one = found.setdefault(mutant.slug, {"killed": 0, "total": 0, "mutants": []})
        one["killed"] += verdict.status == "killed"
        one["total"] += 1
        one["mutants"].append({"what": mutant.what, "file": mutant.file, "status": verdict.status, "by": verdict.by})
    return found


def recorded(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """The last summary of each list."""
    path = root / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit code."""
    listed = lists(root)
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slug", nargs="+", choices=listed, default=listed, metavar="SLUG", help="default: all lists")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time (default 1)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run of the tests (default 600)")
    parser.add_argument("--check", action="store_true", help="run nothing, compare the lists with the modules")
    args = parser.parse_args(argv)
    mutants = [mutant for slug in args.slug for mutant in load(slug, root)]
    if problems := outdated(mutants, root):
        print("\n".join(problems), file=sys.stderr)
        return 1
    if args.check:
        print(f"{len(mutants)} mutants in {len(args.slug)} lists fit their modules")
        return 0
    before = recorded(root)
    first = {(slug, m["what"]): m["by"] for slug in before for m in before[slug]["mutants"] if m["status"] == "killed"}
    found = summary(run(mutants, root, jobs=args.jobs, timeout=args.timeout, first=first))
    after = {slug: (before | found)[slug] for slug in listed if slug in before | found}
    replace_text(root / RECORD, json.dumps(after, indent=1) + "\n")
    print(f"{'list':<14}killed  of")
    for slug, one in found.items():
        print(f"{slug:<14}{one['killed']:>6}{one['total']:>4}")
    alive = [(slug, m) for slug, one in found.items() for m in one["mutants"] if m["status"] != "killed"]
    for slug, m in alive:
        print(f"\n{slug}: {m['what']} ({m['file']}): {m['status']} {m['by']}")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
