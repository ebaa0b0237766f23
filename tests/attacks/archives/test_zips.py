"""Hostile zips: each is refused with an `ArchiveError` before it is unpacked, and costs little to refuse."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from serve import archive
from serve.errors import ArchiveError, BackendStartError
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.config import read_manifest
from serve.torchserve.supervisor import archives_of, examine
from tests.attacks.archives.small_archive import (
    add_declared,
    entries_of,
    hide_entry,
    pack,
    patch_directory,
    patch_header,
    small_archive,
    with_fields,
)


def overlap_entries(path: Path) -> None:
    """Two entries with the same bytes: the way of a zip bomb without nesting."""
    patch_directory(path, 42, "<I", 0, entry=1)


def prepend_bytes(path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())


def append_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 64)


def add_comment(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as opened:
        opened.comment = b"PK\x05\x06" + bytes(18)


def claim_many_entries(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<HH", raw, len(raw) - 14, 60_000, 60_000)
    path.write_bytes(raw)


def add_many_entries(path: Path) -> None:
    pack(path, {**entries_of(path), **{f"extra/{i}": b"" for i in range(20_001)}})


def add_directory_entry(path: Path) -> None:
    pack(path, {**entries_of(path), "extra/": b""})


def add_member(path: Path, after: str, member: str) -> None:
    """Write a member into the manifest twice; of two, Python's readers take the last."""
    entries = entries_of(path)
    text = json.dumps(json.loads(entries["MAR-INF/MANIFEST.json"]), separators=(",", ":"))
    assert after in text
    pack(path, {**entries, "MAR-INF/MANIFEST.json": text.replace(after, after + member, 1).encode()})


ZIPS: dict[str, Callable[[Path], object]] = {
    "empty file": lambda path: path.write_bytes(b""),
    "end record alone": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "64-bit end record alone": lambda path: path.write_bytes(
        b"PK\x06\x07" + b"\xff" * 16 + b"PK\x05\x06" + b"\xff" * 16 + b"\0\0"
    ),
    "bytes before the first entry": prepend_bytes,
    "bytes after the end record": append_bytes,
    "a comment that looks like an end record": add_comment,
    "an entry that the directory does not list": lambda path: hide_entry(path, "torch.py", b"import os"),
    "overlapping entries": overlap_entries,
    "encrypted entry": lambda path: patch_directory(path, 8, "<H", 1),
    "unknown compression method": lambda path: patch_directory(path, 10, "<H", 99),
    "bzip2": lambda path: pack(path, entries_of(path), zipfile.ZIP_BZIP2),
    "lzma": lambda path: pack(path, entries_of(path), zipfile.ZIP_LZMA),
    "other size in the header": lambda path: patch_header(path, 22, "<I", 7),
    "other name in the header": lambda path: patch_header(path, 30, "<B", ord("X")),
    "other method in the header": lambda path: patch_header(path, 8, "<H", 8),
    "streamed entry": lambda path: patch_header(path, 6, "<H", 8),
    "size of 4 GiB": lambda path: patch_directory(path, 24, "<I", 0xFFFFFFFE),
    "offset beyond the file": lambda path: patch_directory(path, 42, "<I", 0x7FFFFFFF),
    "60,000 entries claimed": claim_many_entries,
    "20,001 entries": add_many_entries,
    "folder as an entry": add_directory_entry,
    "an entry that is a file and a folder": lambda path: add_declared(path, {"extra/a": b"", "extra/a/b": b""}),
    "two handlers in the manifest": lambda path: add_member(path, '"model":{', '"handler":"/tmp/evil.py",'),
    "two interpreters in the manifest": lambda path: add_member(path, "{", '"runtime":"/bin/sh",'),
}  # fmt: skip


@pytest.mark.parametrize("spoil", ZIPS.values(), ids=ZIPS.keys())
def test_hostile_zip_is_refused_by_every_reader(tmp_path, spoil):
    path = small_archive(tmp_path)
    spoil(path)
    for read in (archive.verify, lambda path: archive.extract(path, tmp_path / "opened"), read_manifest):
        with pytest.raises(ArchiveError):
            read(path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("entry", ["model.json", "config.json", "MAR-INF/MANIFEST.json", "extra/zeros"])
def test_zip_bomb_is_refused_without_unpacking_it(tmp_path, entry):
    path = small_archive(tmp_path)
    entries = {name: data for name, data in entries_of(path).items() if name != entry}
    info = zipfile.ZipInfo(entry)
    info.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w") as out:
        for name, data in entries.items():
            out.writestr(name, data)
        with out.open(info, "w") as stream:
            for _ in range(256):
                stream.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        for read in (archive.verify, lambda path: archive.extract(path, tmp_path / "opened"), read_manifest):
            with pytest.raises(ArchiveError, match=entry):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name",
    [
        *("extra/evil.py", "extra/evil/__init__.py", "golden/registry.py", "extra/evil.pyc", "extra/evil.so"),
        *("extra/evil.cpython-311-x86_64-linux-gnu.so", "extra/a.pth", "extra/EVIL.PY", "golden/x.pyo"),
        *("code/__init__.py", "code/__init__.pyc", "code/__init__.so"),
        *("sitecustomize.py", "torch/__init__.py", "config.json/x.py", "MAR-INF/x.py", "MAR-INF/x", "code", "extra"),
        *("extra/\x00", "extra/\n", "extra/" + "x" * 256, "extra" + "/x" * 40, "./extra/x", "extra//x", "C:\\x"),
    ],
)  # fmt: skip
def test_entry_that_python_could_import_or_a_system_misread_is_refused(tmp_path, name):
    path = small_archive(tmp_path)
    if "\x00" in name:
        add_declared(path, {"extra/nul": b""})
        path.write_bytes(path.read_bytes().replace(b"extra/nul", b"extra/\0ul"))
    else:
        add_declared(path, {name: b"import os"})
    with pytest.raises(ArchiveError):
        archive.verify(path)


def test_code_below_code_and_data_in_extra_are_accepted(tmp_path):
    path = small_archive(
        tmp_path, code={"mine/__init__.py": b"", "mine/data.json": b"{}"}, extra={"Ünterlagen.txt": b"x"}
    )
    assert archive.verify(path).name == "small"
    deflated = pack(tmp_path / "deflated.mar", entries_of(path), zipfile.ZIP_DEFLATED)
    assert archive.verify(deflated).name == "small"
    assert archive.extract(path, tmp_path / "opened").code is not None


def test_archive_with_importable_extra_file_is_not_written(tmp_path):
    with pytest.raises(ArchiveError, match=r"extra/helper\.py"):
        small_archive(tmp_path, extra={"helper.py": b""})


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": "/bin/sh"},
        {"runtime": "LSP"},
        {"requirementsFile": "extra/requirements.txt"},
        {"configFile": "extra/model-config.yaml"},
        {"engine": {"engineName": "x"}},
        {"model": {"modelName": "small", "modelVersion": "1.0", "handler": "extra/evil.py"}},
    ],
)
def test_manifest_that_asks_torchserve_for_more_is_refused(tmp_path, change):
    path = with_fields(
        small_archive(tmp_path), lambda document: document.update(change), "MAR-INF/MANIFEST.json"
    )
    with pytest.raises(ArchiveError, match="manifest"):
        archive.verify(path)


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../etc/passwd", "model.json", "config.json", "extra/x", ""]
)
def test_golden_frame_outside_the_archive_is_refused(tmp_path, target):
    for frame in (target, {"points": target}):
        path = with_fields(
            small_archive(tmp_path, extra={"x": b""}),
            lambda document, frame=frame: document.update(golden_frame=frame),
        )
        with pytest.raises(ArchiveError):
            archive.verify(path)


def test_file_that_torchserve_unpacked_without_our_knowing_is_refused(tmp_path):
    opened = archive.extract(small_archive(tmp_path), tmp_path / "opened")
    for place in ("torch.py", "golden/registry.py", "code/x.py", "extra/x"):
        added = opened.root / place
        added.parent.mkdir(exist_ok=True)
        added.write_bytes(b"")
        with pytest.raises(ArchiveError, match=place):
            archive.open_directory(opened.root)
        added.unlink()
    link = opened.root / "golden" / "link"
    link.symlink_to("/etc/passwd")
    with pytest.raises(ArchiveError, match="golden/link"):
        archive.open_directory(opened.root)
    link.unlink()
    assert archive.open_directory(opened.root).metadata.name == "small"


def test_pipe_and_folder_in_the_store_do_not_stop_the_start(tmp_path):
    small_archive(tmp_path, "good")
    os.mkfifo(tmp_path / "pipe.mar")
    (tmp_path / "folder.mar").mkdir()
    (tmp_path / "gone.mar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a b.mar").write_bytes(b"")
    twin = pack(tmp_path / "twin.mar", entries_of(tmp_path / "good.mar"))
    for number, spoil in enumerate(ZIPS.values()):
        spoil(small_archive(tmp_path, f"hostile-{number}"))
    good, rejected = examine(tmp_path, archives_of(tmp_path, workers=1))
    assert [model.archive for model in good] == ["good.mar"]
    reasons = {one.archive: one.reason for one in rejected}
    assert len(reasons) == 4 + len(ZIPS) and all(reasons.values())
    assert "good.mar" in reasons[twin.name]
    assert json.dumps(reasons)


def test_torchserve_is_not_started_with_a_hostile_zip(tmp_path):
    hide_entry(small_archive(tmp_path), "sitecustomize.py", b"raise SystemExit")
    server = TorchServe(TorchServeOptions(tmp_path, [ServedModel("small.mar")]))
    with pytest.raises(BackendStartError, match="directory does not list"):
        server.start()
    assert server.run_dir is None
