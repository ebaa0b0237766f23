"""Bags of ROS 1 and 2 and MCAP files as sources of `predict`, written by rosbags and mcap and read back."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson
import pytest

from serve.errors import SettingsError, UndecodableFrame
from serve.predict import open_source
from serve.predict.run import Run, run
from serve.synthetic.moving import generate_sequence
from serve.tracking import TrackOptions
from tests.predict.fake_model import EchoModel
from tests.predict.test_run import lines

rosbags = pytest.importorskip(
    "rosbags", reason="rosbags is an extra: pip install 'mmdet3d-serve[recordings]'"
)
mcap = pytest.importorskip("mcap", reason="mcap is an extra: pip install 'mmdet3d-serve[recordings]'")

from rosbags import rosbag1, rosbag2  # noqa: E402
from rosbags.typesys import Stores, get_typestore  # noqa: E402

SECOND = 10**9
PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
POINTS = np.random.default_rng(0).uniform(-20, 20, (50, 4)).astype(np.float32)


def make(store: Any, is_ros1: bool) -> Callable[..., Any]:
    types = store.types

    def header(stamp_ns: int) -> Any:
        stamp = types["builtin_interfaces/msg/Time"](stamp_ns // SECOND, stamp_ns % SECOND)
        extra = {"seq": 0} if is_ros1 else {}
        return types["std_msgs/msg/Header"](stamp=stamp, frame_id="sensor", **extra)

    def build(kind: str, stamp_ns: int, content: Any) -> Any:
        if kind == "PointCloud2":
            field = types["sensor_msgs/msg/PointField"]
            fields = [field(name, 4 * k, 7, 1) for k, name in enumerate(("x", "y", "z", "intensity"))]
            data = np.frombuffer(content.tobytes(), np.uint8)
            return types["sensor_msgs/msg/PointCloud2"](
                header(stamp_ns), 1, len(content), fields, False, 16, 16 * len(content), data, False
            )
        if kind == "Image":
            return types["sensor_msgs/msg/Image"](
                header(stamp_ns), 6, 8, "rgb8", 0, 24, np.ascontiguousarray(content[..., ::-1]).reshape(-1)
            )
        png = cv2.imencode(".png", content)[1].reshape(-1)
        return types["sensor_msgs/msg/CompressedImage"](header(stamp_ns), "png", png)

    return build


def messages(count: int = 4) -> list[tuple[str, str, int, Any]]:
    """Topic, kind, time and content; header times are half a second before those of the recording."""
    found: list[tuple[str, str, int, Any]] = []
    for k in range(count):
        at = 100 * SECOND + k * SECOND // 10
        found.append(("/lidar", "PointCloud2", at, POINTS + k))
        found.append(("/camera/raw", "Image", at + 1, np.roll(PICTURE, k, 0)))
        found.append(("/camera/png", "CompressedImage", at + 2, np.roll(PICTURE, k, 1)))
    return found


def write_bag1(path: Path) -> Path:
    store = get_typestore(Stores.ROS1_NOETIC)
    build = make(store, True)
    with rosbag1.Writer(path.with_suffix(".bag")) as writer:
        connections: dict[str, Any] = {}
        for topic, kind, at, content in messages():
            name = f"sensor_msgs/msg/{kind}"
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, name, typestore=store)
            raw = store.serialize_ros1(build(kind, at - SECOND // 2, content), name)
            writer.write(connections[topic], at, raw)
    return path.with_suffix(".bag")


def write_bag2(path: Path, storage: Any = None) -> Path:
    store = get_typestore(Stores.ROS2_HUMBLE)
    build = make(store, False)
    options = {} if storage is None else {"storage_plugin": storage}
    with rosbag2.Writer(path, version=9, **options) as writer:
        connections: dict[str, Any] = {}
        for topic, kind, at, content in messages():
            name = f"sensor_msgs/msg/{kind}"
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, name, typestore=store)
            raw = store.serialize_cdr(build(kind, at - SECOND // 2, content), name)
            writer.write(connections[topic], at, raw)
    return path


def write_mcap_folder(path: Path) -> Path:
    return write_bag2(path, rosbag2.StoragePlugin.MCAP)


def write_mcap(path: Path) -> Path:
    """The MCAP file alone, as `mcap` tools hand it on."""
    return next(write_mcap_folder(path).glob("*.mcap"))


WRITERS = {"ros1": write_bag1, "ros2": write_bag2, "mcap in a folder": write_mcap_folder, "mcap": write_mcap}


@pytest.fixture(params=WRITERS)
def recording(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / "drive")


def test_clouds_are_read_with_their_columns_and_times(recording: Path) -> None:
    source = open_source(recording, "lidar")
    assert (source.count, source.live) == (4, False)
    frames = list(source)
    for k, frame in enumerate(frames):
        points = np.load(io.BytesIO(frame.read()))  # type: ignore[arg-type]
        assert points.dtype.names == ("x", "y", "z", "intensity")
        np.testing.assert_array_equal(points["y"], (POINTS + k)[:, 1])
        assert frame.moment is not None
        seconds = frame.moment.pts * frame.moment.time_base
        assert seconds * 10 == 995 + k  # of the header, not of the recording
    assert len({frame.name for frame in frames}) == 4
    assert len(list(source)) == 4  # again from the start


def test_images_are_read_by_topic(recording: Path) -> None:
    for k, frame in enumerate(open_source(recording, "image", topic="/camera/raw")):
        assert frame.pixels is not None
        np.testing.assert_array_equal(frame.pixels(), np.roll(PICTURE, k, 0))
    for k, frame in enumerate(open_source(recording, "image", topic="/camera/png")):
        decoded = cv2.imdecode(np.frombuffer(frame.read(), np.uint8), cv2.IMREAD_COLOR)  # type: ignore[arg-type]
        np.testing.assert_array_equal(decoded, np.roll(PICTURE, k, 1))


def test_topics_are_named_if_one_is_missing_or_several_fit(recording: Path) -> None:
    for topic in ("/velodyne", "/camera/raw", None):
        modality: Any = "image" if topic is None else "lidar"
        with pytest.raises(SettingsError) as raised:
            open_source(recording, modality, topic=topic)
        for name in ("/lidar", "/camera/raw", "/camera/png"):
            assert name in str(raised.value)


def test_a_topic_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        open_source(tmp_path, "lidar", topic="/lidar")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("alone/drive.db3", "ros2 bag reindex"),
        ("several", "a.mcap, b.mcap"),
        ("drive.bag.active", "rosbag reindex"),
        ("drive.mcap.zstd", "zstd -d"),
        ("DRIVE.BAG", "rename"),
    ],
)
def test_what_is_no_readable_recording_is_refused_by_what_to_do(
    tmp_path: Path, given: str, says: str
) -> None:
    files = [f"{given}/a.mcap", f"{given}/b.mcap"] if given == "several" else [given]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(UndecodableFrame, match=says):
        open_source(tmp_path / given, "lidar")


def test_frames_in_folders_beside_a_recording_are_read(tmp_path: Path) -> None:
    (tmp_path / "drive.mcap").write_bytes(b"")
    for part in ("calibration.json", "image.png", "points.bin"):
        (tmp_path / "0001").mkdir(exist_ok=True)
        (tmp_path / "0001" / part).write_bytes(b"")
    assert [frame.name for frame in open_source(tmp_path, "fusion")] == ["0001"]


def test_models_of_several_parts_are_refused(recording: Path) -> None:
    with pytest.raises(UndecodableFrame):
        open_source(recording, "fusion")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.98])
def test_a_truncated_recording_is_an_error_of_ours(recording: Path, part: float) -> None:
    files = [recording] if recording.is_file() else [f for f in recording.iterdir() if f.suffix != ".yaml"]
    for file in files:
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    with pytest.raises(UndecodableFrame):
        list(open_source(recording, "lidar"))


def test_a_message_that_is_none_fails_alone(tmp_path: Path) -> None:
    store = get_typestore(Stores.ROS2_HUMBLE)
    build, name = make(store, False), "sensor_msgs/msg/PointCloud2"
    with rosbag2.Writer(tmp_path / "drive", version=9) as writer:
        connection = writer.add_connection("/lidar", name, typestore=store)
        for k in range(3):
            raw = bytes(store.serialize_cdr(build("PointCloud2", SECOND, POINTS), name))
            writer.write(connection, k, raw[:30] if k == 1 else raw)
    failed = 0
    for frame in open_source(tmp_path / "drive", "lidar"):
        try:
            frame.read()
        except UndecodableFrame:
            failed += 1
    assert failed == 1


def test_predict_reads_a_recording_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    source = write_mcap(tmp_path / "drive")
    out = tmp_path / "out"
    for expected in ((4, 0), (0, 4)):
        model = EchoModel()
        summary = run(Run(open_source(source, "lidar"), model, out, ("jsonl",)))
        model.close()
        assert (summary.predicted, summary.kept, summary.failed) == (*expected, [])
    assert [line["frame"] for line in lines(out / "predictions.jsonl")] == [
        f"{source.name}#{k:06d}" for k in range(4)
    ]


@pytest.mark.slow
def test_the_demo_second_tracks_over_a_bag_as_over_its_clouds(second: Any, tmp_path: Path) -> None:
    clouds = tmp_path / "velodyne"
    clouds.mkdir()
    store = get_typestore(Stores.ROS2_HUMBLE)
    build, name = make(store, False), "sensor_msgs/msg/PointCloud2"
    with rosbag2.Writer(tmp_path / "drive", version=9) as writer:
        connection = writer.add_connection("/lidar", name, typestore=store)
        for number, frame in enumerate(generate_sequence(5)):
            (clouds / f"{number:06d}.bin").write_bytes(frame.scene.to_bytes())
            at = SECOND + number * SECOND // 10
            raw = store.serialize_cdr(build("PointCloud2", at, frame.scene.points), name)
            writer.write(connection, at, raw)
    for source in (clouds, tmp_path / "drive"):
        out = tmp_path / f"out-{source.name}"
        run(Run(open_source(source, "lidar"), second, out, ("jsonl",), tracks=TrackOptions()))
    one, other = (
        [line["answer"] for line in lines(tmp_path / f"out-{name}" / "predictions.jsonl")]
        for name in ("velodyne", "drive")
    )
    assert len(one) == 5 and one[0]["track_ids"]
    assert [orjson.dumps(each) for each in one] == [orjson.dumps(each) for each in other]
