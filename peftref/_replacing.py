"""Files and folders appear whole or not at all: an interruption leaves the old one, and nothing beside it.

What a killed process left is removed by the next one that writes the same file. Whose it is tells a lock that the
system gives up with the process; without such locks (Windows, some network drives) nothing is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl: Any = None  # type: ignore[no-redef]


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new name beside ``path`` (a rename is atomic only within a file system), which takes its place in the end.

    After an error the file that was written under the new name is removed. The file has reached the disk before it is
    renamed, and its name before this returns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for lock in _abandoned(path, r"\.[0-9a-f]{32}\.lock"):
        lock.with_suffix(".part").unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    lock, held = _claimed(lambda: path.with_name(f".{path.name}.{uuid.uuid4().hex}.lock"), Path.touch)
    part = lock.with_suffix(".part")
    try:
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
        _unlock(held)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside ``path``, where there is none yet, which gets that name in the end; gone after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in _abandoned(path, r"-[0-9a-f]{32}"):
        shutil.rmtree(old, ignore_errors=True)
    draft, held = _claimed(lambda: path.with_name(f".{path.name}-{uuid.uuid4().hex}"), Path.mkdir)
    try:
        yield draft
        for file in (*draft.rglob("*"), draft):
            _sync(file)
        draft.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        _unlock(held)


def replace_text(path: str | Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _abandoned(path: Path, ending: str) -> list[Path]:
    """Hidden names that belong to ``path`` and to no living process."""
    pattern = re.compile(re.escape(f".{path.name}") + ending)
    found = []
    for old in path.parent.iterdir() if fcntl is not None else ():
        if pattern.fullmatch(old.name) and (held := _lock(old)) is not None:
            _unlock(held)
            found.append(old)
    return found


def _claimed(name: Callable[[], Path], make: Callable[[Path], None]) -> tuple[Path, int | None]:
    """Something new, locked for us before another process could take it for abandoned."""
    for _ in range(10):
        path = name()
        make(path)
        held = _lock(path)
        if path.exists():
            break
        _unlock(held)
    return path, held


def _lock(path: Path) -> int | None:
    """The system's number of an open file or folder that is locked for us; None if that was not possible."""
    if fcntl is None:
        return None
    held = None
    try:
        held = os.open(path, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _unlock(held)
        return None
    return held


def _unlock(held: int | None) -> None:
    if held is not None:
        os.close(held)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there
        return
    opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
