"""Packed folders: packed by us, packed by hand as ffrecord does, and tables of contents that want to run code."""

from __future__ import annotations

import os
import pickle
import resource
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import ObjectNotFound, StorageError
from serve.storage.packed_folder import MAGIC, PackedFolder, pack_folder
from tests.storage.test_ffrecord import by_hand


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "kitti"
    for name in (
        "velodyne/000008.bin",
        "velodyne/000010.bin",
        "image_2/000008.png",
        "a.txt",
        "z.txt",
        "deep/er/x",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 3)
    (root / "empty").mkdir()
    return root


def test_a_folder_without_required_files_is_an_error_that_names_it_and_leaves_nothing(tmp_path):
    (tmp_path / "bare" / "inner").mkdir(parents=True)
    with pytest.raises(ObjectNotFound, match="bare"):
        pack_folder(tmp_path / "bare", tmp_path / "p.ffr", require_files=True)
    assert not (tmp_path / "p.ffr").exists()


def test_packed_folder_lists_and_reads_like_the_folder(tmp_path, folder):
    told = []
    assert pack_folder(folder, tmp_path / "p.ffr", progress=lambda *now: told.append(now)) == 6
    assert told == [(n, 6) for n in range(1, 7)]
    packed = PackedFolder(tmp_path / "p.ffr")
    assert len(packed) == 6
    assert packed.list() == ["a.txt", "deep", "empty", "image_2", "velodyne", "z.txt"]
    assert packed.list("velodyne") == ["000008.bin", "000010.bin"] and packed.list("empty") == []
    assert packed.list(list_dir=False) == ["a.txt", "z.txt"]
    assert packed.list(list_file=False, recursive=True) == ["deep", "deep/er", "empty", "image_2", "velodyne"]
    assert packed.list("deep", recursive=True) == ["er", "er/x"]
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        assert (
            packed.exists(name)
            and packed.is_file(name) == path.is_file()
            and packed.is_dir(name) == path.is_dir()
        )
    assert bytes(packed.read("./velodyne//000008.bin")) == b"velodyne/000008.bin" * 3
    assert [bytes(b) for b in packed.read_batch(["z.txt", "a.txt"])] == [b"z.txt" * 3, b"a.txt" * 3]
    assert packed.is_dir("") and not packed.exists("a.txt/below") and not packed.exists("../kitti/a.txt")
    for wrong in ("velodyne", "none"):
        with pytest.raises(ObjectNotFound):
            packed.read(wrong)
    for wrong in ("a.txt", "none"):
        with pytest.raises(ObjectNotFound):
            packed.list(wrong)
    packed.close()


def test_folder_packed_by_ffrecord_is_read(tmp_path):
    """The table of contents as ffrecord's pack_folder makes it, for every pickle protocol."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        table = OrderedDict([("a.txt", 0), ("velodyne", OrderedDict([("8.bin", 1), ("9.bin", 2)]))])
        whole = by_hand([b"A", b"eight", b"nine", MAGIC + pickle.dumps(table, protocol)])
        (tmp_path / "p.ffr").write_bytes(whole)
        packed = PackedFolder(tmp_path / "p.ffr")
        assert packed.list(recursive=True) == ["a.txt", "velodyne", "velodyne/8.bin", "velodyne/9.bin"]
        assert bytes(packed.read("velodyne/9.bin")) == b"nine"
        packed.close()


def test_packed_folder_is_what_ffrecord_expects(tmp_path, folder):
    pack_folder(folder, tmp_path / "p.ffr")
    files = [
        "a.txt",
        "deep/er/x",
        "image_2/000008.png",
        "velodyne/000008.bin",
        "velodyne/000010.bin",
        "z.txt",
    ]
    whole = (tmp_path / "p.ffr").read_bytes()
    table = pickle.loads(whole[whole.rindex(MAGIC) + len(MAGIC) :])
    velodyne = OrderedDict([("000008.bin", 3), ("000010.bin", 4)])
    assert table == OrderedDict(
        [
            ("a.txt", 0),
            ("deep", OrderedDict([("er", OrderedDict([("x", 1)]))])),
            ("empty", OrderedDict()),
            ("image_2", OrderedDict([("000008.png", 2)])),
            ("velodyne", velodyne),
            ("z.txt", 5),
        ]
    )
    contents = [(folder / name).read_bytes() for name in files]
    assert whole == by_hand([*contents, MAGIC + pickle.dumps(table, protocol=4)])


NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.recursive(
        st.binary(max_size=50), lambda below: st.dictionaries(NAMES, below, max_size=4), max_leaves=12
    )
)
def test_any_folder_round_trips(tmp_path_factory, tree):
    root = tmp_path_factory.mktemp("any")

    def make(path: Path, what: object) -> None:
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            path.mkdir()
            for name, child in what.items():
                make(path / name, child)

    make(root / "in", tree if isinstance(tree, dict) else {"only": tree})
    pack_folder(root / "in", root / "p.ffr")
    packed = PackedFolder(root / "p.ffr")
    there = {str(p.relative_to(root / "in")) for p in (root / "in").rglob("*")}
    assert set(packed.list(recursive=True)) == there
    for name in packed.list(list_dir=False, recursive=True):
        assert bytes(packed.read(name)) == (root / "in" / name).read_bytes()
    packed.close()


class Wants:
    def __reduce__(self):
        return os.system, ("touch ran-by-a-pickle",)


def bomb() -> OrderedDict:
    table: OrderedDict = OrderedDict()
    for _ in range(60):
        table = OrderedDict(a=table, b=table)
    return table


@pytest.mark.parametrize(
    ("table", "hint"),
    [
        (pickle.dumps(OrderedDict(a=Wants())), r"(posix|os)\.system"),
        (pickle.dumps({"a": 0}), "malformed"),
        (pickle.dumps(OrderedDict(a=0.5)), "malformed"),
        (pickle.dumps(OrderedDict(a=True)), "malformed"),
        (pickle.dumps(OrderedDict([(1, 0)])), "text"),
        (pickle.dumps(OrderedDict(a=1)), "'a' the index 1"),
        (pickle.dumps(OrderedDict(a=-1)), "'a' the index -1"),
        (pickle.dumps(OrderedDict()), "0 files .* 1"),
        (pickle.dumps(bomb()), "malformed"),
        (b"", "damaged"),
        (b"\x80\x04garbage", "damaged"),
    ],
)
def test_malformed_table_of_contents_is_rejected(tmp_path, monkeypatch, table, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.ffr").write_bytes(by_hand([b"x", MAGIC + table]))
    with pytest.raises(StorageError, match=hint):
        PackedFolder(tmp_path / "p.ffr")
    assert [path.name for path in tmp_path.iterdir()] == ["p.ffr"]


@pytest.mark.parametrize("samples", [[], [b"only samples"]])
def test_file_of_samples_is_rejected_as_packed_folder(tmp_path, samples):
    (tmp_path / "p.ffr").write_bytes(by_hand(samples))
    with pytest.raises(StorageError, match="pack_folder"):
        PackedFolder(tmp_path / "p.ffr")


def test_links_are_followed_and_loops_rejected(tmp_path, folder):
    (folder / "link").symlink_to(folder / "velodyne")
    pack_folder(folder, tmp_path / "p.ffr")
    packed = PackedFolder(tmp_path / "p.ffr")
    assert packed.list("link") == packed.list("velodyne")
    packed.close()
    (folder / "deep" / "up").symlink_to(folder)
    with pytest.raises(StorageError, match="deep/up"):
        pack_folder(folder, tmp_path / "q.ffr")


def test_unpackable_entries_raise_and_leave_no_file(tmp_path, folder):
    before = sorted(tmp_path.iterdir())
    os.mkfifo(folder / "pipe")
    with pytest.raises(StorageError, match="pipe"):
        pack_folder(folder, tmp_path / "p.ffr")
    with pytest.raises(StorageError, match="inside"):
        pack_folder(folder, folder / "p.ffr")
    with pytest.raises(ObjectNotFound):
        pack_folder(folder / "none", tmp_path / "p.ffr")
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_and_full_disk_leave_no_file(tmp_path, folder):
    (folder / "large").write_bytes(bytes(3 << 20))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(folder, tmp_path / "p.ffr", progress=interrupt)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match="disk full"):
            pack_folder(folder, tmp_path / "p.ffr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir() if "ffr" in p.name] == []
