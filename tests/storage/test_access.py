"""The front door over local files, web servers, LMDB and packed files; frames and configs for commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from serve import storage
from serve.errors import (
    AccessDenied,
    ArchiveError,
    DownloadError,
    ObjectNotFound,
    StorageError,
    UndecodableFrame,
    UriError,
)
from serve.storage.packed_folder import pack_folder
from serve.verify.frame_source import frames_at
from serve.zoo.config_source import fetch_config, local_config


def test_importing_storage_imports_no_client_library():
    code = (
        "import sys, serve.storage, serve.archive.store, serve.cli.fetch\n"
        "heavy = {'boto3', 'botocore', 'lmdb', 'httpx', 'torch', 'mmengine', 'numpy'} & set(sys.modules)\n"
        "assert not heavy - {'numpy'}, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_local_files_are_read_written_and_listed(tmp_path, cache):
    path = tmp_path / "deep/x.bin"
    for uri in (str(path), f"file://{path}"):
        storage.write_bytes(uri, b"body")
        assert (
            storage.read_bytes(uri) == b"body"
            and storage.local_path(uri, cache) == path
            and storage.exists(uri)
        )
    storage.upload(path, f"file://{tmp_path}/copy.bin")
    assert storage.list_files(tmp_path, (".bin",)) == [str(tmp_path / "copy.bin")]
    with pytest.raises(StorageError, match="sha256"):
        storage.local_path(path, cache, sha256="00")
    for call in (storage.read_bytes, lambda path: storage.local_path(path, cache), storage.list_files):
        with pytest.raises(ObjectNotFound):
            call(tmp_path / "none")
    with pytest.raises(ObjectNotFound):
        storage.upload(tmp_path / "none", str(tmp_path / "y"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.bin", "deep"]


def test_web_files_are_cached_by_version(site, cache):
    site.files["a/x.bin"] = b"old"
    uri = site.url("a/x.bin")
    first = storage.local_path(uri, cache=cache)
    assert first.read_bytes() == b"old" == storage.read_bytes(uri) and storage.exists(uri)
    assert storage.local_path(uri, cache=cache) == first
    site.files["a/x.bin"] = b"newer"
    assert storage.local_path(uri, cache=cache).read_bytes() == b"newer"
    assert not storage.exists(site.url("a/none")) and not list(cache.folder.parent.glob("*.bin"))
    with pytest.raises(ObjectNotFound):
        storage.local_path(site.url("a/none"), cache=cache)
    with pytest.raises(DownloadError):
        storage.local_path(uri, cache, sha256="00")
    with pytest.raises(UriError, match="read-only"):
        storage.write_bytes(uri, b"")
    with pytest.raises(UriError):
        storage.list_files(uri)


def test_web_server_errors_map_to_storage_errors(site, free_ports):
    for status, kind in ((403, AccessDenied), (500, StorageError)):
        site.answers["x"] = lambda handler, status=status: (
            handler.send_response(status), handler.send_header("Content-Length", "0"), handler.end_headers()
        )  # fmt: skip
        with pytest.raises(kind, match=str(status)):
            storage.exists(site.url("x"))
    with pytest.raises(StorageError):
        storage.exists(f"http://127.0.0.1:{free_ports(1)[0]}/x")


def test_interrupted_web_file_is_resumed(site, cache):
    body = bytes(range(256)) * 20_000
    site.files["x.bin"] = body
    cut = [True]

    def once(handler):
        if handler.command == "GET" and cut:
            cut.clear()
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.send_header("ETag", '"1"')
            handler.end_headers()
            handler.wfile.write(body[: len(body) // 2])
            handler.close_connection = True
            return
        first = int((handler.headers.get("range") or "bytes=0-")[6:-1])
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        handler.send_header("Content-Length", str(len(body) - first))
        handler.send_header("ETag", '"1"')
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[first:])

    site.answers["x.bin"] = once
    assert storage.local_path(site.url("x.bin"), cache=cache).read_bytes() == body and not cut


@pytest.fixture
def database(tmp_path) -> str:
    with lmdb.open(str(tmp_path / "f.lmdb")) as made, made.begin(write=True) as transaction:
        for key in (b"b/2.bin", b"a/1.bin", b"\xff"):
            transaction.put(key, b"value of " + key)
    return f"lmdb://{tmp_path}/f.lmdb"


def test_lmdb_values_are_read_listed_and_cached(database, cache, tmp_path):
    assert storage.read_bytes(f"{database}#a/1.bin") == b"value of a/1.bin"
    assert storage.local_path(f"{database}#a/1.bin", cache=cache).read_bytes() == b"value of a/1.bin"
    assert storage.list_files(database, (".bin",)) == [f"{database}#a/1.bin", f"{database}#b/2.bin"]
    assert storage.exists(f"{database}#a/1.bin") and not storage.exists(f"{database}#none")
    for uri, says in (
        (f"{database}#none", "no key 'none'"),
        (f"lmdb://{tmp_path}/none#x", "/none"),
    ):
        with pytest.raises(ObjectNotFound, match=says):
            storage.read_bytes(uri)
    with pytest.raises(StorageError, match="#key"):
        storage.read_bytes(database)
    (tmp_path / "bad").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError):
        storage.read_bytes(f"lmdb://{tmp_path}/bad#x")


@pytest.fixture
def packed(tmp_path) -> str:
    for name in ("velodyne/8.bin", "velodyne/9.bin", "velodyne/notes.txt", "top.bin"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    pack_folder(tmp_path / "in", tmp_path / "p.ffr")
    return f"ffrecord://{tmp_path}/p.ffr"


def test_packed_files_are_read_listed_and_cached(packed, cache, tmp_path):
    assert storage.read_bytes(f"{packed}#velodyne/8.bin") == b"velodyne/8.bin"
    copy = storage.local_path(f"{packed}#velodyne/8.bin", cache=cache)
    assert copy.read_bytes() == b"velodyne/8.bin" and copy.name == "8.bin"
    assert storage.list_files(f"{packed}#velodyne", (".bin",)) == [
        f"{packed}#velodyne/{n}.bin" for n in (8, 9)
    ]
    assert storage.exists(f"{packed}#velodyne") and not storage.exists(f"{packed}#none")
    with pytest.raises(UriError, match="read-only"):
        storage.upload(copy, f"{packed}#velodyne/8.bin")
    # A file packed anew is read anew.
    (tmp_path / "in/velodyne/8.bin").write_bytes(b"another frame")
    pack_folder(tmp_path / "in", tmp_path / "p.ffr")
    assert storage.read_bytes(f"{packed}#velodyne/8.bin") == b"another frame"
    assert storage.local_path(f"{packed}#velodyne/8.bin", cache=cache).read_bytes() == b"another frame"


# --- frames and configs for commands ---


def names(source, modality="lidar"):
    with frames_at(source, modality) as frames:
        assert all(frame.is_file() for frame in frames)
        return [frame.name for frame in frames]


def test_frames_are_read_from_folders_packed_files_and_buckets(packed, tmp_path, bucket, site):
    assert names(tmp_path / "in/velodyne") == names(f"{packed}#velodyne") == ["8.bin", "9.bin"]
    assert names(f"{packed}#velodyne/9.bin") == ["9.bin"] and names(packed) == ["top.bin"]
    for name in ("8.bin", "9.bin", "x.txt"):
        storage.write_bytes(f"s3://{bucket}/clouds/{name}", b"frame")
    assert names(f"s3://{bucket}/clouds") == ["8.bin", "9.bin"]
    assert names(f"s3://{bucket}/clouds/8.bin") == ["8.bin"]
    site.files["c/8.bin"] = b"frame"
    assert names(site.url("c/8.bin")) == ["8.bin"]
    with pytest.raises(UndecodableFrame):
        names(f"s3://{bucket}/clouds", "image")
    with frames_at(f"{packed}#velodyne", "lidar") as frames:
        folder = frames[0].parent
    assert not folder.exists()


def test_frames_of_several_parts_are_read_from_folders_of_buckets_and_packed_files(bucket, tmp_path):
    tree = tmp_path / "tree"
    parts = {
        "swept/000": ("points.bin", "sweep.0.bin", "sweeps.json"),
        "fused/007": ("points.bin", "image.png", "calibration.json"),
        "other/raw": ("9.bin",),
    }
    for folder, names_of in parts.items():
        (tree / folder).mkdir(parents=True)
        for name in names_of:
            (tree / folder / name).write_bytes(folder.encode())
            storage.write_bytes(f"s3://{bucket}/{folder}/{name}", folder.encode())
    pack_folder(tree, tmp_path / "tree.ffr")

    def frames(source, modality):
        with frames_at(source, modality) as found:
            return [(each.name, *sorted(file.name for file in each.iterdir())) for each in found]

    for root in (f"s3://{bucket}/", f"ffrecord://{tmp_path}/tree.ffr#"):
        for kind, modality in (("swept", "lidar"), ("fused", "fusion")):
            (name,) = (Path(folder).name for folder in parts if folder.startswith(kind))
            expected = [(name, *sorted(parts[f"{kind}/{name}"]))]
            assert frames(f"{root}{kind}", modality) == frames(f"{root}{kind}/{name}", modality) == expected
        with pytest.raises(UndecodableFrame):
            frames(f"{root}other", "lidar")  # a folder that is no frame


def test_config_is_fetched_with_its_bases(bucket, tmp_path):
    from mmengine.config import Config

    root = f"s3://{bucket}/configs"
    storage.write_bytes(f"{root}/_base_/deep/a.py", b"a = 1\n")
    storage.write_bytes(f"{root}/_base_/b.py", b"_base_ = 'deep/a.py'\nb = 2\n")
    storage.write_bytes(f"{root}/second/c.py", b"_base_ = ['../_base_/b.py']\nc = 3\n")
    with local_config(f"{root}/second/c.py") as path:
        config = Config.fromfile(path)
        assert (config.a, config.b, config.c) == (1, 2, 3)
    assert not Path(path).exists()
    new = b"from mmengine.config import read_base\nwith read_base():\n    from .._base_.deep.a import *\nc = 3\n"
    storage.write_bytes(f"{root}/second/n.py", new)
    with local_config(f"{root}/second/n.py") as path:
        assert (Path(path).parents[1] / "_base_/deep/a.py").is_file()
    with local_config("second") as path:
        assert path == "second"


def test_file_config_is_used_in_place_and_unsupported_schemes_are_rejected(tmp_path, packed):
    with local_config(f"file://{tmp_path}/c.py") as path:
        assert path == f"{tmp_path}/c.py"
    for uri in (f"{packed}#c.py", "https://host/c.py?token=x"):
        with pytest.raises(ArchiveError, match="https"), local_config(uri):
            pass


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"_base_ = '../../../x.py'", r"\.\./x\.py"),
        (b"_base_ = some()", "_base_"),
        (b"not python at all(", "Python"),
    ],
)
def test_config_with_unreadable_bases_is_rejected(bucket, tmp_path, text, says):
    storage.write_bytes(f"s3://{bucket}/configs/c.py", text)
    with pytest.raises(ArchiveError, match=says):
        fetch_config(f"s3://{bucket}/configs/c.py", tmp_path)
    assert not (tmp_path.parent / "x.py").exists()
