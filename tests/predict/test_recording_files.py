"""Recordings for viewers, read back with the libraries of their formats."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import pytest

from serve.errors import MissingPackage
from serve.predict import open_source
from serve.predict.frames import Clip, Frame, Moment
from serve.predict.run import Run, formats_of, run
from serve.predict.sources import Source
from serve.protocol.options import FrameOptions
from serve.tracking import TrackOptions

EXTRA = "an extra: pip install 'mmdet3d-serve[recordings]'"
POINTS = np.random.default_rng(0).uniform(-20, 20, (50, 4)).astype("<f4")
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)


class OneAnswer:
    """Gives every frame the same answer."""

    identity: Mapping[str, str] = {"name": "one", "version": "1.0"}
    load_dim = 4
    is_remote = False
    description: Any = MappingProxyType({})

    def __init__(self, modality: str, answer: dict[str, Any]) -> None:
        self.modality: Any = modality
        self._answer = answer

    def prepare(self, body: Any, options: Any) -> Any:
        return body

    def submit(self, prepared: Any) -> Future[list[Any]]:
        for each in prepared:
            each.result()
        done: Future[list[Any]] = Future()
        done.set_result([dict(self._answer) for _ in prepared])
        return done

    def close(self) -> None:
        return


def in_space(kind: str = "LiDAR") -> dict[str, Any]:
    return {
        "bboxes_3d": np.array([[10, 1, -1.7, 4, 1.6, 1.5, np.pi / 2], [20, 2, -1.7, 4, 1.6, 1.5, 0]]),
        "scores_3d": np.array([0.9, 0.1]),
        "labels_3d": np.array([2, 2]),
        "names": ["Car", "Car"],
        "box_type_3d": kind,
    }


IN_IMAGE = {
    "bboxes": np.array([[5.0, 6, 20, 30]]),
    "scores": np.array([0.8]),
    "labels": np.array([0]),
    "names": ["person"],
}


@pytest.fixture
def clouds(tmp_path: Path) -> Path:
    folder = tmp_path / "clouds"
    folder.mkdir()
    for k in range(3):
        (folder / f"{k}.bin").write_bytes((POINTS + k).tobytes())
    return folder


def record(source: Path | Source, out: Path, model: OneAnswer, *formats: str) -> Path:
    opened = source if isinstance(source, Source) else open_source(source, model.modality)
    chosen = formats_of(out, formats, opened.count)
    summary = run(Run(opened, model, out, chosen, tracks=TrackOptions(), rate=Fraction(10)))
    assert not summary.failed
    return next(path for path in summary.written if path.suffix in (".mcap", ".rrd"))


def mcap_messages(path: Path) -> list[tuple[str, int, Any]]:
    pytest.importorskip("mcap_protobuf", reason=EXTRA)
    from mcap.reader import make_reader
    from mcap_protobuf.decoder import DecoderFactory

    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True, decoder_factories=[DecoderFactory()])
        return [
            (channel.topic, message.log_time, decoded)
            for _, channel, message, decoded in reader.iter_decoded_messages()
        ]


def test_mcap_has_points_and_boxes_at_their_times(clouds: Path, tmp_path: Path) -> None:
    pytest.importorskip("foxglove_schemas_protobuf", reason=EXTRA)
    path = record(clouds, tmp_path / "seen.mcap", OneAnswer("lidar", in_space()))
    found = mcap_messages(path)
    assert [(topic, at) for topic, at, _ in found if topic == "/points"] == [
        ("/points", k * 10**8) for k in range(3)
    ]
    cloud = next(message for topic, at, message in found if topic == "/points" and at == 10**8)
    assert type(cloud).DESCRIPTOR.full_name == "foxglove.PointCloud"
    assert [field.name for field in cloud.fields] == ["x", "y", "z", "intensity"]
    np.testing.assert_array_equal(np.frombuffer(cloud.data, "<f4").reshape(-1, 4), POINTS + 1)
    scenes = [message for topic, _, message in found if topic == "/detections"]
    assert len(scenes) == 3
    for scene in scenes:
        (entity,) = scene.entities  # the other is below the score
        (cube,) = entity.cubes
        assert (cube.pose.position.x, cube.pose.position.y) == (10, 1)
        assert cube.pose.position.z == pytest.approx(-0.95)  # the centre
        assert (cube.size.x, cube.size.y, cube.size.z) == (4, 1.6, 1.5)
        turn = cube.pose.orientation
        assert (turn.z, turn.w) == (pytest.approx(np.sqrt(0.5)), pytest.approx(np.sqrt(0.5)))
        assert (entity.id, entity.texts[0].text) == ("track 1", "Car 1 0.90")
        assert len(scene.deletions) == 1  # of the frame before


def test_mcap_has_images_and_annotations(tmp_path: Path) -> None:
    pytest.importorskip("foxglove_schemas_protobuf", reason=EXTRA)
    folder = tmp_path / "images"
    folder.mkdir()
    jpeg = cv2.imencode(".jpg", PICTURE)[1].tobytes()
    (folder / "0.jpg").write_bytes(jpeg)
    for k in (1, 2):
        cv2.imwrite(str(folder / f"{k}.bmp"), PICTURE)
    out = tmp_path / "out"
    found = mcap_messages(record(folder, out, OneAnswer("image", IN_IMAGE), "mcap", "jsonl"))
    images = [message for topic, _, message in found if topic == "/image"]
    assert [(image.format, image.data == jpeg) for image in images] == [
        ("jpeg", True),
        ("png", False),
        ("png", False),
    ]
    decoded = cv2.imdecode(np.frombuffer(images[1].data, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decoded, PICTURE)
    annotations = [message for topic, _, message in found if topic == "/annotations"]
    for message in annotations:
        assert [(p.x, p.y) for p in message.points[0].points] == [(5, 6), (20, 6), (20, 30), (5, 30)]
    # An id is there as soon as the track is confirmed (`serve.tracking.image`).
    assert [message.texts[0].text for message in annotations] == [
        "person 0.80",
        "person 0.80",
        "person 1 0.80",
    ]


def test_times_of_the_source_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("foxglove_schemas_protobuf", reason=EXTRA)
    clip = Clip("drive")
    start = 1_700_000_000_000_000_000
    frames = tuple(
        Frame(
            f"{k}", f"{k}", clip, POINTS.tobytes, moment=Moment(start + k * 250_000_000, Fraction(1, 10**9))
        )
        for k in range(2)
    )
    source = Source("drive", 2, False, (clip,), (frames,))
    found = mcap_messages(record(source, tmp_path / "seen.mcap", OneAnswer("lidar", in_space())))
    assert {at for _, at, _ in found} == {start, start + 250_000_000}
    assert found[0][2].timestamp.seconds == 1_700_000_000


def test_picture_that_exif_turns_is_recorded_as_the_model_saw_it(tmp_path: Path) -> None:
    pytest.importorskip("foxglove_schemas_protobuf", reason=EXTRA)
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(PICTURE[..., ::-1]))
    stored.save(tmp_path / "upright.png", exif=exif)
    found = mcap_messages(
        record(tmp_path / "upright.png", tmp_path / "seen.mcap", OneAnswer("image", IN_IMAGE))
    )
    image = next(message for topic, _, message in found if topic == "/image")
    shown = cv2.imdecode(
        np.frombuffer(image.data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    )
    np.testing.assert_array_equal(shown, cv2.rotate(PICTURE, cv2.ROTATE_90_CLOCKWISE))


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("x", "y", "z"), "intensity=0"),
        (("x", "y", "z", "echo"), "x,y,z,intensity=0"),
        (("x", "y", "z"), None),  # of a model that uses no other column
    ],
)
def test_clouds_that_the_model_reads_by_columns_are_recorded_and_drawn(
    tmp_path: Path, names: tuple[str, ...], columns: str | None
) -> None:
    pytest.importorskip("foxglove_schemas_protobuf", reason=EXTRA)
    cloud = np.zeros(5, [(name, "<f4") for name in names])
    cloud["y"] = range(5)
    np.save(tmp_path / "0.npy", cloud)
    source = open_source(tmp_path / "0.npy", "lidar")
    out, model = tmp_path / "out", OneAnswer("lidar", in_space())
    summary = run(Run(source, model, out, ("mcap", "picture"), FrameOptions(columns=columns)))
    assert not summary.failed and list(out.rglob("*.png"))
    (recorded,) = out.rglob("*.mcap")
    points = next(message for topic, _, message in mcap_messages(recorded) if topic == "/points")
    assert np.frombuffer(points.data, "<f4").reshape(-1, 4)[:, 1].tolist() == list(range(5))


def test_times_in_names_are_those_of_the_recording(tmp_path: Path) -> None:
    pytest.importorskip("foxglove_schemas_protobuf", reason=EXTRA)
    folder = tmp_path / "clouds"
    folder.mkdir()
    for microseconds in (1532402927647951, 1532402927897951):
        (folder / f"scene__LIDAR_TOP__{microseconds}.bin").write_bytes(POINTS.tobytes())
    found = mcap_messages(record(folder, tmp_path / "seen.mcap", OneAnswer("lidar", in_space())))
    times = sorted({at for _, at, _ in found})
    assert times == pytest.approx([1532402927647951000, 1532402927897951000], abs=1000)


def test_boxes_of_a_camera_turn_about_the_axis_down(tmp_path: Path) -> None:
    pytest.importorskip("foxglove_schemas_protobuf", reason=EXTRA)
    picture = tmp_path / "street.png"
    cv2.imwrite(str(picture), PICTURE)
    answer = {**in_space("Camera"), "bboxes_3d": np.array([[1, 1.6, 20, 4, 1.5, 1.7, 0.5]] * 2)}
    source = open_source(picture, "image")
    found = mcap_messages(record(source, tmp_path / "seen.mcap", OneAnswer("image", answer)))
    cube = next(message for topic, _, message in found if topic == "/detections").entities[0].cubes[0]
    assert cube.pose.position.y == pytest.approx(1.6 - 0.75)
    assert cube.pose.orientation.y == pytest.approx(np.sin(0.25))
    assert {topic for topic, _, _ in found} == {"/image", "/detections"}


@pytest.mark.parametrize(("modality", "answer"), [("lidar", in_space()), ("image", IN_IMAGE)])
def test_rerun_reads_its_recording(
    clouds: Path, tmp_path: Path, modality: str, answer: dict[str, Any]
) -> None:
    pytest.importorskip("rerun", reason="an extra: pip install 'mmdet3d-serve[rerun]'")
    from rerun.chunk import RrdReader

    source = clouds
    if modality == "image":
        source = tmp_path / "images"
        source.mkdir()
        for k in range(3):
            cv2.imwrite(str(source / f"{k}.png"), PICTURE)
    path = record(source, tmp_path / "seen.rrd", OneAnswer(modality, answer))
    (entry,) = RrdReader(path).recordings()
    chunks = list(RrdReader(path).stream())
    entities = {chunk.entity_path.lstrip("/") for chunk in chunks}
    wanted = {"lidar/points", "lidar/detections"} if modality == "lidar" else {"image", "image/detections"}
    assert wanted <= entities
    rows = sum(chunk.num_rows for chunk in chunks if chunk.entity_path.lstrip("/") in wanted)
    assert rows == 6, entry


@pytest.mark.parametrize("suffix", [".mcap", ".rrd"])
def test_a_package_that_is_missing_is_named(
    clouds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    for name in ("foxglove_schemas_protobuf", "mcap_protobuf", "mcap_protobuf.writer", "rerun"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingPackage, match="pip install"):
        record(clouds, tmp_path / f"seen{suffix}", OneAnswer("lidar", in_space()))
