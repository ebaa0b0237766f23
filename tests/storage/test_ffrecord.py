"""FFRecord files: by hand from the format, back and forth, damaged, and from several processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import struct
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import ObjectNotFound, StorageError
from serve.storage.ffrecord import Reader, Writer


def by_hand(samples: list[bytes], *, checksums: bool = True, meta: bool = True) -> bytes:
    """The format, spelled out from its description."""
    offsets, position = [], 4 + 8 + 12 * len(samples)
    for sample in samples:
        offsets.append(position)
        position += len(sample)
    sums = [zlib.crc32(sample) if checksums else 0 for sample in samples]
    metadata = struct.pack("<q", len(samples))
    metadata += b"".join(struct.pack("<I", one) for one in sums)
    metadata += b"".join(struct.pack("<q", one) for one in offsets)
    return struct.pack("<I", zlib.crc32(metadata) if meta else 0) + metadata + b"".join(samples)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("meta", [True, False])
def test_reader_reads_a_hand_written_file(tmp_path, checksums, meta):
    path = tmp_path / "hand.ffr"
    path.write_bytes(by_hand([b"first", b"", b"third sample"], checksums=checksums, meta=meta))
    with Reader(path) as reader:
        assert len(reader) == 3
        assert [bytes(reader.read(i)) for i in (2, 0, 1)] == [b"third sample", b"first", b""]


def test_writer_writes_the_format_byte_for_byte(tmp_path):
    samples = [os.urandom(n) for n in (0, 1, 4096, 3_000_000, 0)]
    with Writer(tmp_path / "out.ffr", len(samples)) as writer:
        assert [writer.add(sample) for sample in samples] == [0, 1, 2, 3, 4]
    assert (tmp_path / "out.ffr").read_bytes() == by_hand(samples)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(st.lists(st.binary(max_size=300), max_size=8), min_size=1, max_size=4), data=st.data())
def test_several_files_read_as_one_sequence(tmp_path, files, data):
    paths = []
    for number, samples in enumerate(files):
        paths.append(tmp_path / f"{number}.ffr")
        with Writer(paths[-1], len(samples)) as writer:
            for sample in samples:
                writer.add(sample)
    together = [sample for samples in files for sample in samples]
    with Reader(paths) as reader:
        assert len(reader) == len(together)
        indices = data.draw(st.lists(st.integers(0, len(together) - 1), max_size=10)) if together else []
        assert [bytes(view) for view in reader.read_batch(indices)] == [together[i] for i in indices]
        for wrong in (-1, len(together)):
            with pytest.raises(ObjectNotFound):
                reader.read(wrong)


def test_folder_reads_its_files_by_name(tmp_path):
    (tmp_path / "b.ffr").write_bytes(by_hand([b"2"]))
    (tmp_path / "a.ffr").write_bytes(by_hand([b"0", b"1"]))
    (tmp_path / "c.txt").write_text("no")
    with Reader(tmp_path) as reader:
        assert [bytes(reader.read(i)) for i in range(3)] == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    ("corrupt", "hint"),
    [
        (lambda whole: whole[:8], "only 8 bytes"),
        (lambda whole: whole[:30], "truncated"),
        (lambda whole: whole[:4] + struct.pack("<q", -1) + whole[12:], "claims -1 samples"),
        (lambda whole: whole[:4] + struct.pack("<q", 1 << 40) + whole[12:], "truncated"),
        (lambda whole: whole[:13] + b"\xff" + whole[14:], "metadata"),
        (lambda whole: b"\0\0\0\0" + whole[4:24] + struct.pack("<q", 9000) + whole[32:], "sample 0|sample 1"),
        (lambda whole: whole[:-1] + b"?", "sample 1"),
        (lambda whole: whole[:-1], "sample 1"),
        (lambda whole: whole + b"more", "sample 1"),
    ],
)
def test_damaged_file_raises_storage_error(tmp_path, corrupt, hint):
    path = tmp_path / "bad.ffr"
    path.write_bytes(corrupt(by_hand([b"first", b"second"])))
    with pytest.raises(StorageError, match=hint), Reader(path) as reader:
        reader.read_batch([0, 1])


def test_checksums_are_skipped_without_check(tmp_path):
    path = tmp_path / "bad.ffr"
    path.write_bytes(by_hand([b"first", b"second"])[:-1] + b"?")
    with Reader(path, check=False) as reader:
        assert bytes(reader.read(1)) == b"secon?"


def test_missing_files_raise_storage_errors(tmp_path):
    for files in (tmp_path / "none.ffr", tmp_path):
        with pytest.raises(ObjectNotFound):
            Reader(files)
    with pytest.raises(StorageError):
        Reader([])


def test_view_outlives_its_reader(tmp_path):
    path = tmp_path / "a.ffr"
    path.write_bytes(by_hand([b"kept"]))
    reader = Reader(path)
    view = reader.read(0)
    reader.close()
    assert bytes(view) == b"kept"


def _sums(reader: Reader, indices: range, into: multiprocessing.Queue) -> None:
    into.put([zlib.crc32(view) for view in reader.read_batch(indices)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_forked_processes_share_a_reader(tmp_path, method):
    samples = [os.urandom(50_000) for _ in range(40)]
    path = tmp_path / "a.ffr"
    path.write_bytes(by_hand(samples))
    context = multiprocessing.get_context(method)
    with Reader(path) as reader:
        answers = context.Queue()
        workers = [context.Process(target=_sums, args=(reader, range(40), answers)) for _ in range(2)]
        for worker in workers:
            worker.start()
        found = [answers.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join()
        answers.close()
        answers.join_thread()
    assert found == [[zlib.crc32(sample) for sample in samples]] * 2


def test_threads_share_a_reader(tmp_path):
    samples = [os.urandom(20_000) for _ in range(50)]
    path = tmp_path / "a.ffr"
    path.write_bytes(by_hand(samples))
    found: list[bool] = []
    with Reader(path) as reader:

        def read() -> None:
            found.append(all(bytes(reader.read(i)) == samples[i] for i in range(50)))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 4


def test_pickled_reader_reopens_its_files(tmp_path):
    path = tmp_path / "a.ffr"
    path.write_bytes(by_hand([b"x"]))
    with pickle.loads(pickle.dumps(Reader(path, check=False))) as again:
        assert bytes(again.read(0)) == b"x" and again.check is False


@pytest.mark.parametrize("added", [0, 1, 3])
def test_wrong_number_of_samples_leaves_no_file(tmp_path, added):
    with pytest.raises(StorageError, match="2 samples"), Writer(tmp_path / "a.ffr", 2) as writer:
        for _ in range(added):
            writer.add(b"x")
    assert list(tmp_path.iterdir()) == []


def test_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.ffr"
    path.write_bytes(by_hand([b"old"]))
    with pytest.raises(KeyboardInterrupt), Writer(path, 1) as writer:
        writer.add(b"new")
        raise KeyboardInterrupt
    with Reader(path) as reader:
        assert bytes(reader.read(0)) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.ffr"]


def test_writer_on_a_full_disk_leaves_no_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match="disk full"), Writer(tmp_path / "a.ffr", 1) as writer:
            writer.add(bytes(4 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(Path(tmp_path).iterdir()) == []
