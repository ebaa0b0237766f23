"""Packed folders whose table of contents is a pickle made to take memory: each is refused in a few megabytes."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from serve.errors import StorageError
from serve.storage.packed_folder import MAGIC, PackedFolder, pack_folder

ONE_TABLE = b"\x80\x02ccollections\nOrderedDict\nq\x00"


def ffrecord(samples: Sequence[bytes]) -> bytes:
    """File of these samples without checksums."""
    start = 12 + 12 * len(samples)
    offsets = []
    for sample in samples:
        offsets.append(start)
        start += len(sample)
    return struct.pack(
        f"<Iq{len(samples)}I{len(samples)}q", 0, len(samples), *[0] * len(samples), *offsets
    ) + b"".join(samples)


BOMBS = {
    "memo entry of a large number": ONE_TABLE + b"r\xff\xff\xff\x03" + b")R.",
    "memo entry of a large number in text": ONE_TABLE + b"p67108863\n" + b")R.",
    "memo entries without end": ONE_TABLE + b"\x94" * 1_000_000 + b".",
    "empty lists": b"\x80\x02" + b"]" * 1_000_000 + b".",
    "empty dictionaries": b"\x80\x02" + b"}" * 1_000_000 + b".",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "tables that nothing holds": ONE_TABLE + b"h\x00)R" * 30_000 + b".",
    "texts that nothing holds": b"\x80\x04" + b"".join(b"\x8c\x04%04x" % (i % 65536) for i in range(300_000)) + b".",
    "text longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",
    "number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
}  # fmt: skip


@pytest.mark.parametrize("table", BOMBS.values(), ids=BOMBS.keys())
def test_table_made_to_take_memory_is_refused_in_little(tmp_path, monkeypatch, table):
    monkeypatch.setattr("serve.storage.packed_folder._MAX_FOLDERS", 10_000)
    path = tmp_path / "packed.ffr"
    path.write_bytes(ffrecord([b"x", MAGIC + table]))
    tracemalloc.start()
    try:
        with pytest.raises(StorageError):
            PackedFolder(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(table) + (16 << 20)
    finally:
        tracemalloc.stop()


@seed(14)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_packed_folder_with_any_damage_is_refused_or_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "in" / "a").mkdir(parents=True)
    for name in ("a/one", "two"):
        (folder / "in" / name).write_bytes(name.encode())
    pack_folder(folder / "in", folder / "packed.ffr")
    raw = (folder / "packed.ffr").read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 40)))
    (folder / "packed.ffr").write_bytes(raw[:start] + data.draw(st.binary(max_size=20)) + raw[end:])
    for check in (True, False):
        try:
            with_damage = PackedFolder(folder / "packed.ffr", check=check)
            for name in with_damage.list(recursive=True, list_dir=False):
                bytes(with_damage.read(name))
        except StorageError:
            pass


def test_wide_and_deep_tables_are_read_in_every_protocol(tmp_path):
    table: OrderedDict[str, object] = OrderedDict((f"{i:05}.bin", i) for i in range(3000))
    inner: OrderedDict[str, object] = OrderedDict(last=3000)
    for _ in range(100):
        inner = OrderedDict(below=inner, beside=OrderedDict())
    table["deep"] = inner
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "p.ffr").write_bytes(ffrecord([b""] * 3001 + [MAGIC + pickle.dumps(table, protocol)]))
        assert len(PackedFolder(tmp_path / "p.ffr")) == 3001
