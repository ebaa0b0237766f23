"""Videos: upright frames as another reader sees them; written videos keep times, rate and size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from serve.errors import MissingPackage, UndecodableFrame
from serve.predict import video
from serve.predict.frames import Moment
from serve.predict.video_file import VideoFile
from tests.gateway.running import eventually
from tests.predict.conftest import write_video


def pixels(path: Path) -> list[Any]:
    return [frame.pixels() for frame in video.file(path) if frame.pixels is not None]


def seen_by_opencv(path: Path) -> list[Any]:
    capture = cv2.VideoCapture(str(path))
    found: list[Any] = []
    while True:
        there, image = capture.read()
        if not there:
            return found
        found.append(image)


@pytest.mark.parametrize("rotation", [None, 90, 180, 270])
def test_frames_are_upright_as_opencv_shows_them(tmp_path: Path, rotation: int | None) -> None:
    path = write_video(tmp_path / "turned.mp4", 3, rotation=rotation)
    ours, others = pixels(path), seen_by_opencv(path)
    assert len(ours) == len(others) == 3
    for one, other in zip(ours, others, strict=True):
        assert one.shape == other.shape == ((160, 120, 3) if rotation in (90, 270) else (120, 160, 3))
        assert np.abs(one.astype(int) - other).mean() < 1


def test_a_video_that_ends_in_the_middle_gives_the_frames_before(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", 30)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    assert 5 < len(pixels(cut)) < 30


def test_a_damaged_packet_is_passed_over(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mkv", 30)
    body = bytearray(path.read_bytes())
    middle = len(body) // 2
    body[middle : middle + 200] = bytes(200)
    path.write_bytes(body)
    assert len(pixels(path)) > 10


def test_a_container_whose_frames_cannot_be_decoded_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "garbage.mp4")
    body = bytearray(path.read_bytes())
    at = body.index(b"mdat") + 4
    end = body.index(b"moov") - 4
    body[at:end] = bytes(end - at)
    path.write_bytes(body)
    with pytest.raises(UndecodableFrame):
        pixels(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_a_written_video_keeps_irregular_times(tmp_path: Path, suffix: str) -> None:
    source = write_video(tmp_path / "source.mkv", 5, rate=Fraction(20), times=[0, 1, 4, 5, 9])
    target = tmp_path / f"out{suffix}"
    reader = video.file(source)
    assert reader.clip.rate
    file = VideoFile(target, reader.clip.rate)
    for frame in reader:
        assert frame.pixels is not None
        file.write(frame.pixels(), frame.moment)
        assert not target.exists()  # not before it is whole
    assert file.finish() == target
    with av.open(str(target)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([0, 0.05, 0.2, 0.25, 0.45], abs=0.002)
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted([source.name, target.name])


@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_images_become_a_video_of_their_size_and_of_the_given_rate(
    tmp_path: Path, suffix: str, size: tuple[int, int]
) -> None:
    target = tmp_path / f"out{suffix}"
    file = VideoFile(target, Fraction(5))
    shades = (40, 120, 200)
    for shade in shades:
        file.write(np.full((size[1], size[0], 3), shade, np.uint8))
    file.write(np.full((10, 90, 3), 255, np.uint8))  # another shape: scaled, with black borders
    file.finish()
    found = pixels(target)
    assert [image.shape for image in found] == [(48, 64, 3)] * 4  # even sides
    assert [image.mean() for image in found[:3]] == pytest.approx(shades, abs=4)
    assert found[3][24, 32].mean() > 200 and found[3][2].mean() < 20
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 5
        assert [frame.time for frame in container.decode(stream)] == pytest.approx([0, 0.2, 0.4, 0.6])


def test_an_aborted_video_leaves_no_file(tmp_path: Path) -> None:
    file = VideoFile(tmp_path / "out.mp4", Fraction(5))
    file.write(np.zeros((48, 64, 3), np.uint8), Moment(0, Fraction(1, 5)))
    assert list(tmp_path.iterdir())
    file.abort()
    assert list(tmp_path.iterdir()) == []


def test_without_pyav_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, drive: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingPackage, match=r"mmdet3d-serve\[video\]"):
        video.file(drive)


def test_a_live_source_gives_the_latest_frame_not_a_backlog() -> None:
    produced: list[int] = []
    taken = threading.Event()

    def camera() -> Iterator[int]:
        for k in range(1000):
            produced.append(k)
            yield k
            assert k or taken.wait(20)

    frames = video._latest(camera())
    assert next(frames) == 0
    taken.set()
    eventually(lambda: len(produced) == 1000)  # the reader goes on while the model computes
    assert list(frames) == [999]
