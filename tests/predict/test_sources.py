"""What a source names, and a sentence for what it does not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from serve.errors import ObjectNotFound, ServeError, UndecodableFrame
from serve.predict import Source, open_source
from serve.storage.packed_folder import pack_folder
from tests.predict.conftest import write_video


def names(source: Source) -> list[str]:
    return [frame.name for frame in source]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with clouds, images, a text and a folder."""
    folder = tmp_path / "mixed"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.bin", "a.pcd", "a.png", "c.JPG", "notes.txt", "deeper/d.bin"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_folder_gives_the_frames_that_the_model_takes(mixed: Path) -> None:
    assert names(open_source(mixed, "lidar")) == ["a.pcd", "b.bin"]
    assert names(open_source(mixed, "image")) == ["a.png", "c.JPG"]
    assert open_source(mixed, "image").count == 2


def test_a_pattern_reaches_into_folders_and_names_frames_by_their_path(mixed: Path) -> None:
    assert names(open_source(f"{mixed}/*.bin", "lidar")) == ["b.bin"]
    assert names(open_source(f"{mixed}/**/*", "lidar")) == ["a.pcd", "b.bin", "deeper/d.bin"]


def test_frames_that_share_a_stem_keep_their_suffix_in_file_names(mixed: Path) -> None:
    (mixed / "b.pcd").touch()
    assert [frame.stem for frame in open_source(mixed, "lidar")] == ["a", "b.bin", "b.pcd"]


def test_a_frame_is_read_when_it_is_its_turn(mixed: Path) -> None:
    first, second = open_source(mixed, "lidar")
    (mixed / "b.bin").write_bytes(b"later")
    assert (first.read(), second.read()) == (b"a.pcd", b"later")
    (mixed / "b.bin").unlink()
    with pytest.raises(UndecodableFrame):
        second.read()


def test_the_etag_of_a_frame_changes_with_its_file(mixed: Path) -> None:
    before = [frame.etag for frame in open_source(mixed, "lidar")]
    (mixed / "b.bin").write_bytes(b"longer than before")
    after = [frame.etag for frame in open_source(mixed, "lidar")]
    assert before[0] == after[0] and before[1] != after[1]


def test_a_frame_of_several_parts_is_read_by_part(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for part in ("points.bin", "image.png", "calibration.json"):
            (tmp_path / name / part).write_bytes(f"{name} {part}".encode())
    source = open_source(tmp_path, "fusion")
    assert names(source) == ["one", "two"]
    assert list(source)[1].read() == {
        "calibration": b"two calibration.json",
        "image": b"two image.png",
        "points": b"two points.bin",
    }
    assert names(open_source(tmp_path / "one", "fusion")) == ["one"]
    assert names(open_source(tmp_path)) == ["one", "two"]


def test_without_a_modality_the_files_tell_and_a_mixture_is_an_error(mixed: Path) -> None:
    with pytest.raises(UndecodableFrame):
        open_source(mixed)
    assert names(open_source(f"{mixed}/*.png")) == ["a.png"]
    for image in ("a.png", "c.JPG"):
        (mixed / image).unlink()
    assert names(open_source(mixed)) == ["a.pcd", "b.bin"]


def test_a_packed_file_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    (folder / "velodyne").mkdir(parents=True)
    for k in range(2):
        (folder / "velodyne" / f"{k}.bin").write_bytes(b"%d" % k)
    pack_folder(folder, tmp_path / "packed.ffr")
    source = open_source(f"ffrecord://{tmp_path}/packed.ffr#velodyne", "lidar")
    assert [(frame.name, bytes(frame.read())) for frame in source] == [("0.bin", b"0"), ("1.bin", b"1")]  # type: ignore[arg-type]
    assert names(open_source(f"ffrecord://{tmp_path}/packed.ffr#velodyne/1.bin", "lidar")) == ["1.bin"]
    assert names(open_source(f"ffrecord://{tmp_path}/packed.ffr#velodyne/[1-9].*", "lidar")) == ["1.bin"]
    with pytest.raises(UndecodableFrame, match="#velodyne"):  # names the folder in it
        open_source(tmp_path / "packed.ffr", "lidar")


def test_frames_of_several_parts_in_a_packed_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for part in ("points.bin", "sweep.0.bin", "sweeps.json"):
            (tmp_path / "frames" / name / part).write_bytes(f"{name} {part}".encode())
    pack_folder(tmp_path / "frames", tmp_path / "packed.ffr")
    source = open_source(tmp_path / "packed.ffr", "lidar")
    assert names(source) == ["one", "two"]
    body: Any = list(source)[1].read()
    assert {part: bytes(content) for part, content in body.items()} == {
        "points": b"two points.bin",
        "sweep.0": b"two sweep.0.bin",
        "sweeps": b"two sweeps.json",
    }
    assert names(open_source(f"ffrecord://{tmp_path}/packed.ffr#one", "lidar")) == ["one"]


def test_videos_are_a_source_of_images(tmp_path: Path, drive: Path) -> None:
    source = open_source(drive, "image")
    assert source.count == 6 and not source.live
    assert names(source) == [f"drive.mp4#{k:06d}" for k in range(6)]
    write_video(tmp_path / "more.mp4", 2)
    both = open_source(tmp_path, "image")
    assert both.count == 8
    assert [clip.name for clip in both.clips] == ["drive", "more"]
    assert names(open_source(f"{tmp_path}/m*.mp4", "image")) == ["more.mp4#000000", "more.mp4#000001"]


def test_frames_of_a_video_are_encoded_without_loss(drive: Path) -> None:
    frame = next(iter(open_source(drive, "image")))
    assert frame.pixels is not None
    body: Any = frame.read()
    assert np.array_equal(cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR), frame.pixels())


@pytest.mark.parametrize(
    ("make", "modality", "kind"),
    [
        (lambda at: at / "missing.png", "image", UndecodableFrame),
        (lambda at: at, "lidar", UndecodableFrame),  # an empty folder
        (lambda at: f"{at}/*.bin", "lidar", UndecodableFrame),
        (lambda at: at / "text.mp4", "image", UndecodableFrame),
        (lambda at: at / "empty.mp4", "image", UndecodableFrame),
        (lambda at: at / "sound.mp4", "image", UndecodableFrame),
        (lambda at: "ffrecord:///no/such.ffr#x", "lidar", ObjectNotFound),
        (lambda at: at / "drive.mp4", "lidar", UndecodableFrame),
    ],
)
def test_what_is_no_source_is_an_error(
    tmp_path: Path, make: Callable[[Path], Any], modality: Any, kind: type[ServeError]
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    source = make(folder)
    if Path(source).suffix == ".mp4":
        _write_odd_video(Path(source))
    with pytest.raises(kind):
        open_source(source, modality)


def _write_odd_video(path: Path) -> None:
    if path.stem == "drive":
        write_video(path)
    elif path.stem == "sound":
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        path.write_bytes(b"" if path.stem == "empty" else b"this is a text, not a video" * 100)


def test_a_camera_that_is_not_there_is_an_error_when_it_is_read() -> None:
    source = open_source("47", "image")
    assert source.live and source.count is None
    with pytest.raises(UndecodableFrame, match="/dev/video47"):
        next(iter(source))


def test_a_stream_is_read_until_it_ends(tmp_path: Path) -> None:
    body = write_video(tmp_path / "live.mkv", 40).read_bytes()

    class Sending(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader may close first
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Sending) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            source = open_source(f"http://127.0.0.1:{server.server_port}/live", "image")
            assert source.live and source.count is None
            frames = list(source)
        finally:
            server.shutdown()
            thread.join()
    assert 0 < len(frames) <= 40  # those that came too fast are dropped
    moments = [frame.moment.pts for frame in frames if frame.moment]
    assert moments == sorted(moments) and len(moments) == len(frames)
    assert frames[-1].pixels is not None and frames[-1].pixels().shape == (120, 160, 3)


def test_a_stream_that_nobody_sends_is_an_error(free_ports: Callable[[int], list[int]]) -> None:
    (port,) = free_ports(1)
    source = open_source(f"rtsp://127.0.0.1:{port}/live", "image")
    assert source.live
    with pytest.raises(UndecodableFrame):
        next(iter(source))
