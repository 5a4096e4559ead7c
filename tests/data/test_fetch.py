"""Downloads against a server on this machine: whole and checked, or an error and nothing left behind."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import pickle
import socket
import struct
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision

from peftref.data import fetch_cifar10, fetch_cifar100, fetch_fashion_mnist, load
from peftref.data.fetch import CIFAR10, CIFAR100, CIFAR_URL, FASHION_FILES, FASHION_URL, download

BODY = bytes(range(256)) * 9000  # 2.3 MB: several blocks
SHA256, MD5 = hashlib.sha256(BODY).hexdigest(), hashlib.md5(BODY).hexdigest()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; ``/torn`` announces all of BODY and hangs up after a third of it; ``/slow`` never answers."""

    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path == "/torn":
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[: len(BODY) // 3])
        elif self.path == "/slow":
            threading.Event().wait(0.5)
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, []
        handler = type("H", (Handler,), {"requests": self.requests})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(BODY)
    site = Site(tmp_path / "served")
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()
    thread.join()


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_whole_file_arrives_under_its_name(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "data"
    assert download(site.url + "file", path, sha256=SHA256.upper(), size=len(BODY)) == path
    assert path.read_bytes() == BODY
    assert files(tmp_path / "new") == ["folder/data"]


def test_a_good_file_is_not_fetched_again_and_a_bad_one_is(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(BODY)
    download(site.url + "file", path, md5=MD5)
    assert site.requests == []
    path.write_bytes(BODY[:-1])
    download(site.url + "file", path, md5=MD5)
    assert site.requests == ["/file"] and path.read_bytes() == BODY


@pytest.mark.parametrize(
    ("page", "checks", "error", "message"),
    [
        (
            "torn",
            {"sha256": SHA256},
            ConnectionError,
            rf"cut short after {len(BODY) // 3} of {len(BODY)}|IncompleteRead",
        ),
        ("missing", {"sha256": SHA256}, ConnectionError, "404"),
        ("slow", {"sha256": SHA256, "timeout": 0.1}, ConnectionError, "timed out"),
        ("file", {"sha256": "0" * 64}, ValueError, f"expected sha256 {'0' * 64}, got {SHA256}"),
        ("file", {"md5": "0" * 32}, ValueError, f"expected md5 {'0' * 32}, got {MD5}"),
        ("file", {"sha256": SHA256, "size": 5}, ValueError, rf"\(5 bytes\), got {SHA256} \({len(BODY)} bytes\)"),
    ],
)
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_failures_leave_everything_as_it_was(
    site: Site, tmp_path: Path, page: str, checks: dict, error: type[Exception], message: str, before: bytes | None
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if before is not None:
        (folder / "set").write_bytes(before)
    with pytest.raises(error, match=message) as caught:
        download(site.url + page, folder / "set", **checks)
    assert site.url + page in str(caught.value)
    assert files(folder) == ([] if before is None else ["set"])
    assert before is None or (folder / "set").read_bytes() == before


def test_offline_error_names_address_place_and_cure(tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set"
        with pytest.raises(ConnectionError) as caught:
            download(url, tmp_path / "set", sha256=SHA256)
    assert all(word in str(caught.value) for word in (url, str(tmp_path / "set"), "network", "another machine"))
    assert files(tmp_path) == []


def test_interrupting_leaves_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is no ordinary exception; the half-written file goes all the same."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peftref.data.fetch.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(site.url + "file", tmp_path / "data" / "set", sha256=SHA256)
    assert files(tmp_path / "data") == []


def test_exactly_one_checksum_is_needed(site: Site, tmp_path: Path) -> None:
    for checks in ({}, {"sha256": SHA256, "md5": MD5}):
        with pytest.raises(ValueError, match="sha256, md5: expected exactly one"):
            download(site.url + "file", tmp_path / "set", **checks)
    assert site.requests == []


def test_addresses_and_checksums_are_those_of_torchvision() -> None:
    sets = torchvision.datasets
    for ours, theirs in ((CIFAR10, sets.CIFAR10), (CIFAR100, sets.CIFAR100)):
        assert (CIFAR_URL + ours.name, ours.md5, ours.folder) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
        assert set(ours.files) == {name for name, _ in theirs.train_list + theirs.test_list} | {theirs.meta["filename"]}
    assert FASHION_URL in sets.FashionMNIST.mirrors
    assert {f"{name}.gz": md5 for name, md5 in FASHION_FILES.items()} == dict(sets.FashionMNIST.resources)


def test_fashion_mnist_is_laid_out_for_torchvision_and_load(site: Site, tmp_path: Path) -> None:
    rng, md5 = np.random.default_rng(0), {}
    for name in FASHION_FILES:
        n = 6 if name.startswith("train") else 4
        shape = (n, 28, 28) if "images" in name else (n,)
        values = rng.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)
        idx = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + values.tobytes()
        packed = gzip.compress(idx)
        (site.folder / f"{name}.gz").write_bytes(packed)
        md5[name] = hashlib.md5(packed).hexdigest()
    folder = fetch_fashion_mnist(tmp_path / "root", url=site.url, md5=md5)
    assert {f for f in files(folder) if not f.endswith(".gz")} == set(FASHION_FILES)
    fetch_fashion_mnist(tmp_path / "root", url=site.url, md5=md5)
    assert len(site.requests) == 4  # the second call found everything there
    ours = load("fashion_mnist", tmp_path / "root")
    for train, split in ((True, ours.train), (False, ours.test)):
        theirs = torchvision.datasets.FashionMNIST(tmp_path / "root", train=train)
        assert theirs.data.float().div(255).unsqueeze(1).equal(split.x) and theirs.targets.equal(split.y)
    assert ours.classes == tuple(name.lower() for name in torchvision.datasets.FashionMNIST.classes)


def cifar_archive(classes: int) -> bytes:
    """A published archive with three images per batch."""
    rng, archive = np.random.default_rng(classes), CIFAR10 if classes == 10 else CIFAR100
    key, names_key = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in archive.files:
            batch: dict[str, object] = {
                "data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), key: rng.integers(0, classes, 3).tolist(),
            }  # fmt: skip
            if "meta" in name:
                batch = {names_key: [f"class {k}" for k in range(classes)]}
            body = pickle.dumps(batch, protocol=2)
            info = tarfile.TarInfo(f"{archive.folder}/{name}")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_laid_out_for_torchvision_and_load(site: Site, tmp_path: Path, classes: int) -> None:
    archive, fetch_set = (CIFAR10, fetch_cifar10) if classes == 10 else (CIFAR100, fetch_cifar100)
    body, root = cifar_archive(classes), tmp_path / "root"
    (site.folder / archive.name).write_bytes(body)
    with pytest.raises(ValueError, match=f"expected md5 {archive.md5}"):  # the real checksum refuses the small archive
        fetch_set(root, url=site.url)
    assert files(root) == []
    folder = fetch_set(root, url=site.url, md5=hashlib.md5(body).hexdigest())
    assert files(root) == sorted([archive.name, *(f"{archive.folder}/{name}" for name in archive.files)])
    (folder / archive.files[0]).unlink()  # an incomplete folder is completed, from the archive that is still there
    fetch_set(root, url=site.url, md5=hashlib.md5(body).hexdigest())
    assert len(site.requests) == 2
    ours = load(f"cifar{classes}", root)
    assert ours.classes == tuple(f"class {k}" for k in range(classes))
    published = getattr(torchvision.datasets, f"CIFAR{classes}")

    class Small(published):  # torchvision checks the MD5 of every file; None means any
        train_list = [[name, None] for name, _ in published.train_list]
        test_list = [[name, None] for name, _ in published.test_list]
        meta = {**published.meta, "md5": None}

    for train, split in ((True, ours.train), (False, ours.test)):
        theirs = Small(root, train=train)
        assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), (split.x * 255).round().byte().numpy())
        assert theirs.targets == split.y.tolist()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../../escaped", tarfile.REGTYPE), ("/tmp/escaped", tarfile.REGTYPE), ("link", tarfile.SYMTYPE)],
)
def test_an_archive_cannot_write_outside_its_folder(site: Site, tmp_path: Path, name: str, kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    (site.folder / CIFAR10.name).write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=f"expected files inside its folder, got '{name}'"):
        fetch_cifar10(tmp_path / "root", url=site.url, md5=hashlib.md5(buffer.getvalue()).hexdigest())
    assert files(tmp_path / "root") == [CIFAR10.name] and not (tmp_path / "escaped").exists()
