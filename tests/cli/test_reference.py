"""``mmdet3d-serve reference``: counts of a model on frames, in its archive, which is served as before."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve import archive
from serve.cli import reference
from serve.errors import ArchiveError, SettingsError
from serve.watch.reference import ENTRY, WINDOW_FRAMES, Recording, reference_of
from serve.watch.statistics import CLASS, Layout
from tests.archive.test_format import METADATA, rewrite, write


@pytest.mark.slow
def test_reference_is_recorded_in_the_archive_and_bad_frames_are_left_out(
    demo_mar: Path, street: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = tmp_path / "velodyne"
    frames.mkdir()
    for k in range(3):
        street.tofile(frames / f"{k}.bin")
    (frames / "3.bin").write_bytes(b"odd")
    out = tmp_path / "watched.mar"
    assert reference.main([str(demo_mar), str(frames), "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "3.bin" in printed.err and not any(f"{k}.bin" in printed.err for k in range(3))
    metadata = archive.verify(out)
    before = archive.verify(demo_mar)
    assert ENTRY in metadata.files and ENTRY not in before.files
    assert {name: sha for name, sha in metadata.files.items() if name != ENTRY} == before.files
    found = archive.extract(out, tmp_path / "opened").reference()
    assert found is not None and found.counts.frames == 3 and found.counts.of("points").sum() == 3
    assert (
        found.counts.of(CLASS).sum() > 0 and archive.extract(demo_mar, tmp_path / "old").reference() is None
    )
    assert found.recording is not None
    assert (found.recording.source, found.recording.window_frames) == (str(frames), WINDOW_FRAMES)
    age = datetime.now(UTC) - datetime.fromisoformat(found.recording.time)
    assert timedelta(0) <= age < timedelta(minutes=10)
    # Again, in place: the same counts and limits.
    again = tmp_path / "again.mar"
    assert reference.main([str(out), str(frames), "--out", str(again), "--device", "cpu"]) == 0
    second = archive.read_statistics(again)
    assert second is not None
    assert replace(second, recording=None).document() == replace(found, recording=None).document()


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("s3://bucket/val", "s3://bucket/val"),
        ("https://user:secret@host/a.mp4?token=secret#secret", "https://host/a.mp4?…"),
        ("rtsp://user:secret@camera/stream", "rtsp://camera/stream"),
        ("ffrecord:///packed.ffr#velodyne", "ffrecord:///packed.ffr#velodyne"),
        ("frames/a#b?c", "frames/a#b?c"),
    ],
)
def test_an_archive_shows_no_secret_of_its_source(source: str, shown: str) -> None:
    assert reference._without_secrets(source) == shown


def test_an_archive_that_is_missing_is_an_error_of_usage(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        reference.main([str(tmp_path / "none.mar"), str(tmp_path)])


def recorded(folder: Path, **changes: Any) -> Path:
    """A small archive with a reference of one frame."""
    folder.mkdir()
    path = write(folder, **changes)
    counts = Layout.of_classes(METADATA.classes).empty()
    counts.frames = 1
    counts.of(CLASS)[:] = (5, 2, 0)
    counts.add_values("distance", np.full(7, 12.0))
    recording = Recording("2026-11-28T20:00:00+00:00", "s3://bucket/val", 1)
    archive.record_statistics(path, path, reference_of([counts], 0.4, 1, recording))
    return path


def test_a_reference_is_copied_to_a_new_version_and_nothing_else_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    former, path = recorded(tmp_path / "former"), write(tmp_path, replace(METADATA, version="2.0"))
    before = archive.verify(path)
    path.chmod(0o600)
    assert reference.main([str(path), "--from", str(former)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    after = archive.verify(path)
    assert (after.version, {name: each for name, each in after.files.items() if name != ENTRY}) == (
        "2.0", before.files,
    )  # fmt: skip
    assert after.files[ENTRY] == archive.verify(former).files[ENTRY]
    found = archive.read_statistics(path)
    assert found is not None and found.recording is not None and found.recording.source == "s3://bucket/val"
    assert found.score_thr == 0.4 and found.counts.of(CLASS).tolist() == [5, 2, 0]
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("distance")] == [
        [
            "distance",
            "7",
            f"{found.limits['distance']:.3f}",
        ]  # without a mean, which the archive does not have
    ]


def test_an_archive_writes_nothing_to_the_terminal_but_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    former, path = recorded(tmp_path / "former"), write(tmp_path)
    found = archive.read_statistics(former)
    assert found is not None
    hostile = replace(found, recording=Recording("\x1b]0;now", "a\nsha256    0", 1))
    archive.record_statistics(former, former, hostile)
    assert reference.main([str(path), "--from", str(former)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and sum(line.startswith("sha256") for line in printed.splitlines()) == 1


def test_a_copy_counts_classes_by_name_in_whatever_order(tmp_path: Path) -> None:
    former = recorded(tmp_path / "former")
    path = write(tmp_path, replace(METADATA, classes=METADATA.classes[::-1]))
    assert reference.main([str(path), "--from", str(former)]) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modality": "camera"}, ("modality", "lidar", "camera")),
        ({"box_type_3d": "Camera"}, ("box_type_3d", "LiDAR", "Camera")),
        ({"classes": ("Car", "Van")}, ("'Cyclist'", "'Van'")),
        ({"classes": (*METADATA.classes, "Van")}, ("'Van'",)),
    ],
)
def test_a_copy_to_another_kind_of_model_is_refused_with_what_differs(
    tmp_path: Path, change: dict[str, Any], named: tuple[str, ...]
) -> None:
    former, path = recorded(tmp_path / "former"), write(tmp_path, replace(METADATA, **change))
    before = path.read_bytes()
    with pytest.raises(ArchiveError) as refused:
        reference.main([str(path), "--from", str(former)])
    assert all(each in str(refused.value) for each in named)
    assert path.read_bytes() == before


def test_a_copy_from_an_archive_without_a_reference_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ArchiveError):
        reference.main([str(path), "--from", str(path)])


def test_a_copy_of_an_altered_reference_is_refused(tmp_path: Path) -> None:
    former, path = recorded(tmp_path / "former"), write(tmp_path)
    rewrite(former, lambda entries: entries.update({ENTRY: entries[ENTRY].replace(b"0.4", b"0.5")}))
    with pytest.raises(ArchiveError):
        reference.main([str(path), "--from", str(former)])


@pytest.mark.parametrize(
    "arguments",
    [[], ["frames", "--from", "{former}"], ["--from", "{former}", "--score-thr", "0.5"]],
    ids=["neither", "both", "option-of-recording"],
)
def test_frames_and_a_copy_exclude_each_other(tmp_path: Path, arguments: list[str]) -> None:
    former, path = recorded(tmp_path / "former"), write(tmp_path)
    with pytest.raises(SystemExit) as ended:
        reference.main([str(path), *(each.format(former=former) for each in arguments)])
    assert ended.value.code == 2
