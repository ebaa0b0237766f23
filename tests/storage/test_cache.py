"""The cache: whole or not there, checked, bounded, and shared by processes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from pathlib import Path

import pytest

from serve.errors import StorageError
from serve.storage import Cache
from serve.storage.cache import map_disk_errors


def filling(body: bytes, promised: str | None = None):
    def fill(file):
        file.write(body)
        return promised

    return fill


def never(file):
    raise AssertionError("there was a good copy")


def test_cache_fills_an_entry_once(cache):
    path = cache.get("a", "x.bin", filling(b"body"))
    assert path.read_bytes() == b"body" and path.name == "x.bin"
    assert cache.get("a", "x.bin", never) == path
    assert cache.get("b", "x.bin", filling(b"other")) != path


@pytest.mark.parametrize("spoil", ["altered", "cut", "no note", "gone"])
def test_altered_entry_is_filled_again(cache, spoil):
    path = cache.get("a", "x.bin", filling(b"body"))
    if spoil == "altered":
        path.write_bytes(b"evil")
    elif spoil == "cut":
        path.write_bytes(b"bo")
    elif spoil == "gone":
        path.unlink()
    else:
        path.with_name("x.bin.sha256").unlink()
    assert cache.get("a", "x.bin", filling(b"body")).read_bytes() == b"body"


@pytest.mark.parametrize("failure", [StorageError("broken"), KeyboardInterrupt()])
def test_failed_fill_leaves_no_file(cache, failure):
    def fill(file):
        file.write(b"half")
        raise failure

    with pytest.raises(type(failure)):
        cache.get("a", "x.bin", fill)
    assert [p for p in cache.folder.rglob("*") if p.is_file()] == []
    assert cache.get("a", "x.bin", filling(b"body")).read_bytes() == b"body"


def test_wrong_hash_raises_and_leaves_no_file(cache):
    with pytest.raises(StorageError, match="sha256"):
        cache.get("a", "x.bin", filling(b"body"), sha256="00")
    with pytest.raises(StorageError, match="sha256"):
        cache.get("a", "x.bin", filling(b"body", promised="0" * 64))
    assert [p for p in cache.folder.rglob("*") if p.is_file()] == []
    cache.get("a", "x.bin", filling(b"body"))
    with pytest.raises(StorageError, match="sha256"):
        cache.get("a", "x.bin", never, sha256="00")


def test_full_disk_raises_and_leaves_no_file(cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match="disk full"):
            cache.get("a", "x.bin", filling(bytes(2 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p for p in cache.folder.rglob("*") if p.is_file()] == []


def test_trim_evicts_least_recently_used_and_keeps_entries_in_use(tmp_path):
    cache = Cache(tmp_path, 1200)  # three entries with their notes
    paths = {name: cache.get(name, "x", filling(bytes(300))) for name in "abc"}
    long_ago = time.time() - 7200
    for age, name in enumerate("abc"):
        os.utime(paths[name].parent, (long_ago + age, long_ago + age))
    cache.get("a", "x", never)  # used just now
    cache.get("d", "x", filling(bytes(300)))
    assert paths["a"].is_file() and not paths["b"].exists() and paths["c"].is_file()
    # Over the bound with nothing that may go: all of it was used within the last minutes.
    os.utime(paths["c"].parent)
    cache.get("e", "x", filling(bytes(300)))
    assert all(cache.entry(name, "x").is_file() for name in "acde")


def _get(folder: Path, counts: multiprocessing.Queue, start: object) -> None:
    def fill(file):
        counts.put(os.getpid())
        file.write(bytes(1 << 20))

    start.wait(30)
    Cache(folder, 1 << 30).get("a", "x", fill)


def test_one_of_several_processes_fills_an_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    counts, start = context.Queue(), context.Event()
    workers = [context.Process(target=_get, args=(tmp_path, counts, start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    counts.get(timeout=10)
    assert counts.empty()
    counts.close()
    counts.join_thread()
    assert Cache(tmp_path, 1 << 30).get("a", "x", never).stat().st_size == 1 << 20


def test_map_disk_errors_passes_storage_errors():
    with pytest.raises(StorageError, match="as it is"), map_disk_errors("somewhere"):
        raise StorageError("as it is")
    with pytest.raises(StorageError, match="somewhere"), map_disk_errors("somewhere"):
        raise PermissionError("no")
