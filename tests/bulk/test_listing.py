"""Folders and buckets are listed from the disk, as `open_source` lists them from memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest

from serve import storage
from serve.bulk.listing import list_frames, sorted_frames
from serve.bulk.parts import manifest_line
from serve.cli import bulk
from serve.errors import StorageError, UndecodableFrame
from serve.predict.frames import Frame
from serve.predict.sources import open_source
from serve.predict.stems import caseless
from serve.storage.packed_folder import pack_folder
from tests.storage import servers

CLOUDS = ("b.bin", "a.pcd", "a.bin", "A.BIN", "a-1.bin", "c.d.bin", "c.bin", "x.txt", "é.bin", "p.png", "c")
CLASHING = (*CLOUDS, "a.bin.pcd", "A.pcd", "e\u0301.bin", "É.pcd", "c.d.pcd", "p.PNG", "p.png.png", "p.jpg")
FOLDERS = ("f2/points.bin", "f2/sweeps.json", "f1/sweeps.json", "f1/points.bin", "f3/points.bin", "z.bin")
VIEWS = (
    "v2/image.png",
    "v2/calibration.json",
    "v1/points.bin",
    "v1/image.png",
    "v1/calibration.json",
    "v3/image.png",
)


def make(folder: Path, files: Sequence[str]) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def has_a_file_each(frames: Any) -> bool:
    stems = [caseless(frame.stem) for frame in frames]
    return len(set(stems)) == len(stems)


def lines(frames: Any) -> list[bytes]:
    return [manifest_line(frame) for frame in frames]


@pytest.mark.parametrize(
    ("files", "modality"),
    [
        (CLOUDS, "lidar"),
        (CLOUDS, "depth"),
        (CLOUDS, "image"),
        (CLASHING, "lidar"),
        (CLASHING, "image"),
        (FOLDERS, "lidar"),
        (VIEWS, "fusion"),
        (("sweeps.json", "points.bin"), "lidar"),
        (("calibration.json", "image.png"), "mono3d"),
    ],
)
def test_a_folder_has_the_frames_that_open_source_lists(tmp_path: Path, files: Any, modality: Any) -> None:
    source = str(make(tmp_path / "frames", files))
    assert lines(list_frames(source, modality)) == lines(open_source(source, modality))
    assert has_a_file_each(list_frames(source, modality))


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with servers.moto() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "y"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        yield boto3.client("s3")


@pytest.mark.parametrize(
    ("files", "modality"),
    [
        (CLOUDS, "lidar"),
        (CLOUDS, "image"),
        (CLASHING, "lidar"),
        (FOLDERS, "lidar"),
        ((*FOLDERS, "F1/points.bin", "F1/sweeps.json"), "lidar"),
        (VIEWS, "multiview"),
        (("sweeps.json", "points.bin", "a/sweeps.json", "a/points.bin"), "lidar"),
        (("1/2/3.bin", "1.bin"), "lidar"),
    ],
)
def test_a_prefix_has_the_frames_that_open_source_lists(
    client: Any, request: Any, files: Any, modality: Any
) -> None:
    bucket = f"b{abs(hash(request.node.name))}"
    client.create_bucket(Bucket=bucket)
    for name in files:
        client.put_object(Bucket=bucket, Key=f"drive/{name}", Body=b"x")
    for source in (f"s3://{bucket}/drive", f"s3://{bucket}/drive/"):
        assert lines(list_frames(source, modality)) == lines(open_source(source, modality))
        assert has_a_file_each(list_frames(source, modality))


def test_values_of_a_database_and_packed_files_have_a_name_and_a_file_each(tmp_path: Path) -> None:
    import lmdb

    folder = make(tmp_path / "frames", ("a.bin", "A.bin", "a.pcd", "a.bin.pcd", "b.bin"))
    pack_folder(folder, tmp_path / "packed.ffr")
    keys = ("a/1.bin", "b/1.bin", "b//1.bin", "../b/1.bin", "A/1.bin", "2.bin")
    with (
        lmdb.open(str(tmp_path / "keys"), map_size=1 << 20) as database,
        database.begin(write=True) as transaction,
    ):
        for key in keys:
            transaction.put(key.encode(), b"x")
    for source, count in ((str(tmp_path / "packed.ffr"), 5), (f"lmdb://{tmp_path}/keys", 6)):
        frames = list(list_frames(source, "lidar"))
        assert len({frame.name for frame in frames}) == count and has_a_file_each(frames)
        assert not any(".." in frame.stem.split("/") for frame in frames)


def test_a_folder_or_prefix_without_frames_is_an_error(client: Any, tmp_path: Path) -> None:
    client.create_bucket(Bucket="empty")
    for source in (str(make(tmp_path / "frames", ["a.txt"])), "s3://empty/drive"):
        with pytest.raises(UndecodableFrame):
            list(list_frames(source, "lidar"))


def test_links_that_lead_nowhere_are_frames_that_cannot_be_read(tmp_path: Path) -> None:
    for name, target in (("a.bin", "none"), ("b.bin", "b.bin"), ("c.txt", "none"), ("d", "d")):
        (tmp_path / name).symlink_to(target)
    frames = list(list_frames(str(tmp_path), "lidar"))
    assert [frame.name for frame in frames] == ["a.bin", "b.bin"]
    for frame in frames:
        with pytest.raises(UndecodableFrame):
            frame.read()


def test_a_folder_that_cannot_be_read_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.bin").touch()
    frames = list_frames(str(tmp_path), "lidar")

    def deny(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", deny)
    with pytest.raises(StorageError) as caught:
        list(frames)
    assert str(tmp_path) in str(caught.value)


def test_a_name_that_json_cannot_hold_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.bin").touch()
    with pytest.raises(UndecodableFrame):
        list(list_frames(str(tmp_path), "lidar"))
    with pytest.raises(UndecodableFrame):
        lines(list_frames(f"{tmp_path}/*.bin", "lidar"))


def test_a_key_that_json_cannot_hold_is_an_error_if_it_is_called_as_a_frame(tmp_path: Path) -> None:
    import lmdb

    for name, key in (("other", b"\xff"), ("frame", b"\xff.bin")):
        with lmdb.open(str(tmp_path / name)) as database, database.begin(write=True) as transaction:
            transaction.put(b"a.bin", b"x")
            transaction.put(key, b"y")
    assert [frame.name for frame in list_frames(f"lmdb://{tmp_path}/other", "lidar")] == ["a.bin"]
    with pytest.raises(UndecodableFrame):
        list_frames(f"lmdb://{tmp_path}/frame", "lidar")
    assert storage.read_bytes(f"lmdb://{tmp_path}/frame#\udcff.bin") == b"y"


def test_names_beyond_the_memory_of_a_sort_come_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.bulk.listing._CACHE_KIB", 16)
    names = [f"{k * 7919 % 20_011:09d}.{'pcd' if k % 5 else 'bin'}" for k in range(20_011)]
    found: list[Frame] = list(sorted_frames(names, "/data/"))
    assert [frame.name for frame in found] == sorted(names)
    assert found[0].origin == f"/data/{found[0].name}"


def test_a_manifest_with_other_lines_is_another_run(tmp_path: Path) -> None:
    listed, found = tmp_path / "frames.txt", []
    for content in ("0.bin\n", "0.bin\n1.bin\n", "0.bin\n"):
        listed.write_text(content)
        with ExitStack() as stack:
            found.append(bulk._source_identity(str(listed), bulk._manifest(str(listed), stack)))
    assert found[0] == found[2] != found[1] and found[0]["source"] == str(listed)
    assert bulk._source_identity(str(tmp_path), None) == {"source": str(tmp_path)}
