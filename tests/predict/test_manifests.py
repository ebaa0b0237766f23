"""Manifests: what a line may be, how frames are named, and lists that would give a frame two results or none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from serve.bulk.listing import list_frames
from serve.errors import BadRequest, ObjectNotFound, ServeError, UndecodableFrame
from serve.predict.manifests import read_manifest
from serve.predict.sources import open_source
from serve.storage.packed_folder import pack_folder


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """A folder with ``velodyne/0.bin`` to ``2.bin``."""
    for k in range(3):
        path = tmp_path / "drive" / "velodyne" / f"{k}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % k)
    return tmp_path / "drive"


def test_paths_are_relative_to_the_manifest_and_named_below_their_folder(drive: Path, tmp_path: Path) -> None:
    listed = write(
        tmp_path / "lists" / "a.txt",
        "# a comment",
        "",
        "../drive/velodyne/2.bin",
        str(drive / "velodyne" / "0.bin"),
        f"file://{drive}/velodyne/../velodyne/1.bin",
    )
    for source in (open_source(listed, "lidar"), list_frames(str(listed), "lidar")):
        assert source.count == 3
        assert [(frame.name, frame.stem, frame.read()) for frame in source] == [
            ("2.bin", "2", b"2"),
            ("0.bin", "0", b"0"),
            ("1.bin", "1", b"1"),
        ]


def test_changed_files_are_noticed_by_predict(drive: Path) -> None:
    listed = write(drive / "a.txt", "velodyne/0.bin", "velodyne/missing.bin")
    before = [frame.etag for frame in open_source(listed, "lidar")]
    (drive / "velodyne" / "0.bin").write_bytes(b"longer")
    after = [frame.etag for frame in open_source(listed, "lidar")]
    assert before[0] and before[0] != after[0] and before[1] == after[1] == ""


def test_lines_of_json_name_frames_and_parts(drive: Path) -> None:
    write(drive / "c.json", "{}")
    listed = write(
        drive / "a.jsonl",
        {"frame": "of/one", "origin": "velodyne/0.bin"},
        {"frame": "two", "origin": {"points": "velodyne/1.bin", "calibration": "c.json"}, "stem": "labels/2"},
        json.dumps("velodyne/2.bin"),
    )
    frames = list(open_source(listed, "fusion"))
    assert [(frame.name, frame.stem) for frame in frames] == [
        ("of/one", "of/one"),
        ("two", "labels/2"),
        ("2.bin", "2"),
    ]
    assert frames[1].read() == {"points": b"1", "calibration": b"{}\n"}


def test_frames_of_several_parts_are_folders(drive: Path) -> None:
    write(drive / "f" / "000.7" / "sweeps.json", "[]")
    (drive / "f" / "000.7" / "points.bin").write_bytes(b"points")
    (frame,) = open_source(write(drive / "a.txt", "f/000.7/"), "lidar")
    assert (frame.name, frame.read()) == ("000.7", {"points": b"points", "sweeps": b"[]\n"})


def test_a_frame_that_is_missing_or_no_file_fails_alone(drive: Path) -> None:
    (drive / "empty").mkdir()
    os.mkfifo(drive / "pipe.bin")  # reading it would wait for ever
    listed = write(
        drive / "a.txt", "velodyne/0.bin", "velodyne/none.bin", "empty", "none.ffr/x", "pipe.bin", "/dev/zero"
    )
    first, *others = open_source(listed, "lidar")
    assert first.read() == b"0"
    for frame in others:
        with pytest.raises(ServeError):
            frame.read()


def test_stems_differ_where_names_without_suffix_do_not(drive: Path) -> None:
    listed = write(drive / "a.txt", "velodyne/0.bin", "velodyne/0.pcd", "velodyne/1.bin")
    assert [frame.stem for frame in open_source(listed, "lidar")] == ["0.bin", "0.pcd", "1"]


def test_packed_files_and_their_members_can_be_listed(drive: Path, tmp_path: Path) -> None:
    pack_folder(drive, tmp_path / "drive.ffr")
    members = [f"ffrecord://{tmp_path}/drive.ffr#velodyne/{k}.bin" for k in (2, 0)]
    frames = list(open_source(write(tmp_path / "a.txt", *members), "lidar"))
    assert [(frame.name, frame.read()) for frame in frames] == [("2.bin", b"2"), ("0.bin", b"0")]


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        (["velodyne/0.bin", "velodyne/1.bin", "./velodyne/0.bin"], 3),
        (["velodyne/0.bin", {"frame": "0.bin", "origin": "velodyne/1.bin"}], 2),
        (["velodyne/0.bin", "gopher://host/x"], 2),
        (["velodyne/0.bin", "s3://user:secret@bucket/x"], 2),
        (["velodyne/0.bin", {"frame": "a", "answer": {}}], 2),
        (["velodyne/0.bin", "{not json"], 2),
        ([{"frame": "../../etc/passwd", "origin": "velodyne/0.bin"}], 1),
        ([{"frame": "/etc/passwd", "origin": "velodyne/0.bin"}], 1),
        ([{"frame": "a", "stem": "..", "origin": "velodyne/0.bin"}], 1),
        ([{"frame": 7, "origin": "velodyne/0.bin"}], 1),
        ([{"origin": {"points": "velodyne/0.bin"}}], 1),
        ([{"frame": "a", "origin": {"points": 7}}], 1),
        (["x" * 1_100_000], 1),
        (["a\0b"], 1),
    ],
)
def test_a_line_that_is_none_is_named(drive: Path, lines: list[Any], number: int) -> None:
    with pytest.raises(BadRequest, match=f"line {number}") as caught:
        open_source(write(drive / "a.jsonl", *lines), "lidar")
    assert "secret" not in str(caught.value)


def test_a_byte_order_mark_and_ends_of_lines_are_no_part_of_a_path(drive: Path) -> None:
    (drive / "a.txt").write_bytes(b"\xef\xbb\xbfvelodyne/1.bin\r\nvelodyne/2.bin\r\n")
    assert [frame.name for frame in open_source(drive / "a.txt", "lidar")] == ["1.bin", "2.bin"]


@pytest.mark.parametrize("suffix", ["txt.gz", "JSONL.zst"])
def test_a_compressed_manifest_is_not_taken_for_a_frame(drive: Path, suffix: str) -> None:
    (drive / f"a.{suffix}").write_bytes(b"\x1f\x8b")
    with pytest.raises(UndecodableFrame):
        open_source(drive / f"a.{suffix}", "lidar")


def test_lists_without_frames_are_errors(drive: Path) -> None:
    with pytest.raises(UndecodableFrame):
        open_source(write(drive / "a.txt", "", "# nothing"), "lidar")
    (drive / "a.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(BadRequest):
        open_source(drive / "a.txt", "lidar")
    with pytest.raises(ObjectNotFound):
        read_manifest(str(drive / "none.txt"))


def test_a_pickle_is_not_opened(drive: Path) -> None:
    (drive / "infos.pkl").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(UndecodableFrame, match="manifest"):
        open_source(drive / "infos.pkl", "lidar")
    assert not os.path.exists("opened")
