"""MCAP files as other recorders write them: without an index, without chunks, cut short, of several publishers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.errors import SettingsError, UndecodableFrame
from serve.predict import open_source
from tests.predict.test_recordings import POINTS, SECOND, make

rosbags = pytest.importorskip(
    "rosbags", reason="rosbags is an extra: pip install 'mmdet3d-serve[recordings]'"
)
mcap = pytest.importorskip("mcap", reason="mcap is an extra: pip install 'mmdet3d-serve[recordings]'")

from mcap.writer import CompressionType, IndexType, Writer  # noqa: E402
from rosbags.typesys import Stores, get_typestore  # noqa: E402

COUNT = 6


def write(path: Path, publishers: int = 1, encoding: str = "cdr", **options: Any) -> Path:
    """Write a file whose publishers take turns on one topic; every chunk has one message."""
    store = get_typestore(Stores.ROS2_HUMBLE if encoding == "cdr" else Stores.ROS1_NOETIC)
    build, name = make(store, encoding == "ros1"), "sensor_msgs/msg/PointCloud2"
    with path.open("wb") as file:
        writer = Writer(file, chunk_size=64, **options)
        writer.start()
        schema = writer.register_schema(name, "ros2msg", b"")
        channels = [writer.register_channel("/lidar", encoding, schema) for _ in range(publishers)]
        for k in range(COUNT):
            at = 100 * SECOND + k * SECOND // 10
            message = build("PointCloud2", at, POINTS + k)
            raw = (
                store.serialize_cdr(message, name)
                if encoding == "cdr"
                else store.serialize_ros1(message, name)
            )
            writer.add_message(channels[k % publishers], at, bytes(raw), at)
        writer.finish()
    return path


def numbers(path: Path) -> list[int]:
    """Read every frame, and return which message it is."""
    found = []
    for frame in open_source(path, "lidar", topic="/lidar"):
        points = np.load(io.BytesIO(frame.read()))  # type: ignore[arg-type]
        found.append(round(float(points["x"][0] - POINTS[0, 0])))
    return found


LAYOUTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "lz4": {"compression": CompressionType.LZ4},
    "no compression": {"compression": CompressionType.NONE},
    "no chunks": {"use_chunking": False},
    "no statistics": {"use_statistics": False},
    "no index": {"index_types": IndexType.NONE},
    "no channels in the summary": {"repeat_channels": False},
    "no summary": {
        "index_types": IndexType.NONE,
        "repeat_channels": False,
        "repeat_schemas": False,
        "use_statistics": False,
        "use_summary_offsets": False,
    },
    "ros1": {"encoding": "ros1"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "drive.mcap", **LAYOUTS[layout])
    assert open_source(path, "lidar").count in (COUNT, None)
    assert numbers(path) == list(range(COUNT))


@pytest.mark.parametrize("layout", ["usual", "no chunks"])
def test_topic_of_several_publishers_is_one_topic(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "drive.mcap", publishers=2, **LAYOUTS[layout])
    assert open_source(path, "lidar").count == COUNT  # no topic named: there is one
    assert numbers(path) == list(range(COUNT))


@pytest.mark.parametrize("layout", ["usual", "no chunks", "no summary"])
def test_frames_before_the_cut_are_read(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "drive.mcap", **LAYOUTS[layout])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    seen = []
    with pytest.raises(UndecodableFrame):
        for frame in open_source(path, "lidar"):
            seen.append(frame.name)
    assert 0 < len(seen) < COUNT


def test_file_without_an_index_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "drive.mcap", **LAYOUTS["no chunks"])
    from mcap.stream_reader import StreamReader

    read = []
    inner = StreamReader._read_record
    monkeypatch.setattr(StreamReader, "_read_record", lambda *args: read.append(inner(*args)) or read[-1])
    source = open_source(path, "lidar")
    read.clear()
    frames = iter(source)
    next(frames)
    first = len(read)
    next(frames)
    assert len(read) == first + 1  # one record on
    frames.close()


def test_other_messages_on_the_topic_are_named(tmp_path: Path) -> None:
    path = tmp_path / "drive.mcap"
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start()
        for encoding, name in (("cdr", "sensor_msgs/msg/PointCloud2"), ("json", "foxglove.PointCloud")):
            schema = writer.register_schema(name, "ros2msg", b"")
            writer.register_channel(f"/{encoding}", encoding, schema)
            writer.register_channel("/both", encoding, schema)
        writer.finish()
    assert list(open_source(path, "lidar", topic="/cdr")) == []
    for topic in ("/json", "/both"):
        with pytest.raises(SettingsError, match=r"foxglove\.PointCloud in json"):
            open_source(path, "lidar", topic=topic)
