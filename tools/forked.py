"""Pytest again and again, without importing torch again and again.

The slow packages, never ours, are imported once; each run is a fork of that process, so it sees our files as they are
by then. Used by ``tools.mutants``; needs ``os.fork`` (Linux, macOS).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# What tests import and what takes long. A package that is not there is left to the tests, which may skip.
SLOW = ("torch", "torchvision", "timm.data.mixup", "pandas", "scipy.stats", "sklearn.linear_model", "sklearn.tree",
        "hypothesis.strategies", "safetensors.torch", "pytest", "peft")  # fmt: skip
# Instead of pyproject.toml's options: no doctests, nothing written beside the tests.
PYTEST = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]


class Forked:
    """Runs tests in one tree.

    Args:
        tree: with our package and its tests.

    Raises:
        RuntimeError: Python would import the package from elsewhere.
    """

    def __init__(self, tree: Path) -> None:
        env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # notebooks, coverage
        self.tree = tree
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tools.forked", *SLOW], cwd=tree, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        origin = Path(self._ask(None))
        if origin != tree / "peftref/__init__.py":
            self.close()
            raise RuntimeError(f"expected our package from {tree}, got {origin}")

    def pytest(self, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
        """Exit code, None after too many seconds; and what was printed."""
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
            code = self._ask({"tests": list(tests), "timeout": timeout, "log": log.name})
            return code, log.read()

    def close(self) -> None:
        """End the process."""
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def _ask(self, question: object) -> object:
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        if not (answer := self.server.stdout.readline()):
            raise RuntimeError("the process that runs the tests has ended")
        return json.loads(answer)


def run(tests: list[str], timeout: float, log: str) -> int | None:
    """One fork."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code if code >= 0 else None
    signal.setitimer(signal.ITIMER_REAL, timeout)  # SIGALRM ends a process that does not handle it
    out = os.open(log, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import pytest

    code = 3
    try:
        code = int(pytest.main([*PYTEST, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve(slow: Sequence[str]) -> None:
    """Import packages, then answer questions until there are no more."""
    for name in slow:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert "peftref" not in sys.modules
    from hypothesis import Phase, settings

    # The same examples at each run, whatever the time they take, and no search for the smallest that fails.
    few = (Phase.explicit, Phase.generate)
    settings.register_profile("forked", phases=few, derandomize=True, database=None, deadline=None)
    settings.load_profile("forked")
    gc.freeze()  # or each fork would look through, and so copy, all that has been imported
    for line in sys.stdin:
        question = json.loads(line)
        answer = run(**question) if question else importlib.util.find_spec("peftref").origin
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
