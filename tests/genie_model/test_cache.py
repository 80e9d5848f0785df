"""The cache is bounded, shared, and never serves what is not whole; a failing store is tried again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.throttled import ThrottledFileSystem
from genie_model import cache, files

SIZE = 1000


class Remote:
    """Files of SIZE bytes each on a remote store, by number."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        ThrottledFileSystem.reads.clear()
        for number in range(4):
            files.write_atomic(self.uri(number), self.data(number))

    def uri(self, number: int) -> str:
        return f"{self.folder}/{number}.bin"

    def data(self, number: int) -> bytes:
        return bytes([number]) * SIZE

    def sha256(self, number: int) -> str:
        return hashlib.sha256(self.data(number)).hexdigest()

    def fetched(self, number: int) -> bytes | None:
        file = cache.fetch(self.uri(number), self.sha256(number), SIZE)
        if file is None:
            return None
        with file:
            return file.read()

    def copy(self, number: int) -> Path:
        return files.cache_dir() / f"{self.sha256(number)}.bin"

    def age(self, number: int, hours: float) -> None:
        then = time.time() - hours * 3600
        os.utime(self.copy(number), (then, then))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_WAITS", (0.001, 0.001))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GENIE_CACHE_BYTES", str(2 * SIZE))
    return Remote(f"throttled://{tmp_path.name}")


def test_what_was_read_longest_ago_makes_room(remote: Remote) -> None:
    assert [remote.fetched(number) for number in (0, 1)] == [remote.data(0), remote.data(1)]
    remote.age(0, hours=3)
    remote.age(1, hours=2)
    assert remote.fetched(0) == remote.data(0)  # from now on 1 is the one that was read longest ago
    assert remote.fetched(2) == remote.data(2)
    assert [remote.copy(number).exists() for number in range(3)] == [True, False, True]
    assert len(ThrottledFileSystem.reads) == 3


def test_what_is_in_use_stays_and_the_rest_finds_no_room(remote: Remote) -> None:
    for number in (0, 1):
        remote.fetched(number)
    assert remote.fetched(2) is None
    assert [remote.fetched(number) for number in (0, 1)] == [remote.data(0), remote.data(1)]
    assert len(ThrottledFileSystem.reads) == 2


def test_nothing_goes_for_a_file_that_cannot_fit(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.fetched(0)
    remote.age(0, hours=2)
    monkeypatch.setenv("GENIE_CACHE_BYTES", str(SIZE - 1))
    assert remote.fetched(1) is None
    assert remote.copy(0).exists()


def test_a_file_that_is_pushed_out_can_be_read_to_its_end(remote: Remote) -> None:
    file = cache.fetch(remote.uri(0), remote.sha256(0), SIZE)
    assert file is not None
    cache.forget(remote.uri(0), remote.sha256(0))
    with file:
        assert file.read() == remote.data(0)


def test_a_truncated_copy_is_downloaded_again(remote: Remote) -> None:
    remote.fetched(0)
    remote.copy(0).write_bytes(remote.data(0)[:-1])
    assert remote.fetched(0) == remote.data(0)
    assert remote.copy(0).stat().st_size == SIZE


def test_half_a_download_is_never_served(remote: Remote) -> None:
    partial = remote.copy(0).with_suffix(".bin.part")
    partial.parent.mkdir()
    partial.write_bytes(b"killed")
    assert remote.fetched(0) == remote.data(0)
    assert not partial.exists()
    partial.write_bytes(b"killed")
    os.utime(partial, (0, 0))
    remote.fetched(1)
    assert not partial.exists()  # nor kept


def test_other_bytes_are_refused_and_not_kept(remote: Remote) -> None:
    files.write_atomic(remote.uri(0), remote.data(3))
    with pytest.raises(cache.OtherBytesError, match=r"0\.bin has another SHA-256"):
        remote.fetched(0)
    assert not list(files.cache_dir().glob("*.bin*"))


def test_threads_that_ask_for_one_file_download_it_once(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThrottledFileSystem, "latency", 0.05)  # they all ask while the first downloads
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(remote.fetched, [0] * 8)) == {remote.data(0)}
    assert len(ThrottledFileSystem.reads) == 1


def test_what_arrives_at_once_keeps_the_bound(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    together, read = threading.Barrier(3), ThrottledFileSystem.cat_file

    def cat_file(self: ThrottledFileSystem, path: str) -> bytes:
        together.wait(timeout=20)  # by now each of the three has seen that there is room
        return read(self, path)

    monkeypatch.setattr(ThrottledFileSystem, "cat_file", cat_file)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(remote.fetched, range(3)))
    assert found.count(None) == 1
    assert [data is not None for data in found] == [remote.copy(number).exists() for number in range(3)]
    assert len(list(files.cache_dir().glob("*.bin*"))) == 2


_PROCESS = """
import hashlib, sys
from genie_model import cache
cache._IN_USE = 0.0  # so they push each other's files out all the time
for _ in range(25):
    for path in sys.argv[1:]:
        sha256 = hashlib.sha256(open(path, "rb").read()).hexdigest()
        if file := cache.fetch(path, sha256, 1000):
            with file:
                assert hashlib.sha256(file.read()).hexdigest() == sha256, path
"""


def test_processes_share_it_and_keep_its_bound(remote: Remote, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(remote.data(number))
    command = [sys.executable, "-c", _PROCESS, *map(str, paths)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, error = process.communicate(timeout=100)
        assert process.returncode == 0, error
    left = list(files.cache_dir().glob("*.bin*"))
    assert 1 <= len(left) <= 2
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in left} == {path.stem for path in left}


def test_an_error_that_passes_is_waited_out() -> None:
    errors = [ConnectionResetError("reset"), RuntimeError("503")]

    def read() -> str:
        if errors:
            raise errors.pop()
        return "read"

    assert cache.try_again("gs://bucket/file", read) == "read"


def test_an_error_that_stays_names_the_file() -> None:
    def read() -> None:
        raise RuntimeError("503")

    with pytest.raises(
        OSError, match=r"gs://bucket/file could not be read in 3 tries, the last: RuntimeError\('503'\)"
    ):
        cache.try_again("gs://bucket/file", read)


def test_a_missing_file_is_not_waited_for() -> None:
    tries = []

    def read() -> None:
        tries.append(0)
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        cache.try_again("gs://bucket/file", read)
    assert len(tries) == 1


def test_the_bound_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENIE_CACHE_BYTES", "50 GB")
    with pytest.raises(ValueError, match="GENIE_CACHE_BYTES=50 GB is not a number of bytes"):
        cache.limit()


def test_a_remote_store_is_asked_for_a_few_files_at_once_and_they_come_in_order() -> None:
    asked, together = list[int](), threading.Barrier(16)

    def read(number: int) -> int:
        asked.append(number)
        if len(asked) <= 64:
            together.wait(timeout=20)  # breaks unless 16 come, each time
        time.sleep(0.02 if number % 3 else 0.04)
        return number

    found = cache.each("memory://files", read, range(64))
    assert next(found) == 0
    assert len(asked) == 16, "not all: their results lie in memory"
    assert list(found) == list(range(1, 64))
    assert next(cache.each("here", read, range(64))) == 0
    assert asked[64:] == [0]
