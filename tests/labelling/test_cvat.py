"""The auto-annotation function, driven by CVAT's own driver; its server is the only part that is not CVAT's."""

from __future__ import annotations

import io
import logging
from contextlib import closing
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

cvataa = pytest.importorskip("cvat_sdk.auto_annotation", reason="needs cvat-sdk")

from cvat_sdk import models  # noqa: E402
from cvat_sdk.auto_annotation import driver  # noqa: E402
from cvat_sdk.masks import decode_mask  # noqa: E402

from serve.client import Client  # noqa: E402
from serve.errors import BadRequest, SettingsError  # noqa: E402
from serve.labelling.cvat import annotate_clouds, create, cuboids  # noqa: E402
from tests.labelling.conftest import CUBOID, HEIGHT, WIDTH, masks  # noqa: E402


class Task:
    """A task of two pictures at a CVAT server, and what is uploaded to it."""

    def __init__(self, png: bytes, kind: str) -> None:
        image = PIL.Image.open(io.BytesIO(png))
        self.labels = [
            models.Label(id=i, name=name, type=kind, attributes=[], sublabels=[])
            for i, name in ((71, "Pedestrian"), (72, "Car"))
        ]
        self.samples = [
            SimpleNamespace(
                frame_index=i, frame_name=f"{i}.png", media=SimpleNamespace(load_image=lambda: image)
            )
            for i in (3, 5)
        ]
        self.shapes: list[Any] = []
        self.logger = logging.getLogger("cvat")
        self.tasks = SimpleNamespace(api=self)

    def partial_update_annotations(
        self, action: str, task_id: int, patched_labeled_data_request: Any
    ) -> None:
        assert action == "create" and task_id == 137
        self.shapes += patched_labeled_data_request.shapes


def annotate(
    monkeypatch: pytest.MonkeyPatch, png: bytes, function: Any, kind: str, **options: Any
) -> list[Any]:
    task = Task(png, kind)
    monkeypatch.setattr(driver, "TaskDataset", lambda client, task_id, load_annotations: task)
    with closing(function):
        cvataa.annotate_task(task, 137, function, **options)
    return task.shapes


def test_driver_annotates_rectangles(served, png, monkeypatch):
    function = create(served.url, "images")
    assert [(label.name, label.id) for label in function.spec.labels] == [("Car", 0), ("Pedestrian", 1)]
    shapes = annotate(monkeypatch, png, function, "rectangle")
    assert [(shape.frame, shape.label_id, shape.type.value) for shape in shapes] == [
        (3, 72, "rectangle"), (3, 71, "rectangle"), (5, 72, "rectangle"), (5, 71, "rectangle"),
    ]  # fmt: skip
    assert shapes[0].points == [4.0, 6.0, 20.0, 18.0] and shapes[1].points == [30.0, 10.0, 40.0, 30.0]


def test_driver_passes_its_threshold_on(served, png, monkeypatch):
    assert len(annotate(monkeypatch, png, create(served.url, "images"), "rectangle", conf_threshold=0.5)) == 2


def test_driver_annotates_masks(served, png, monkeypatch):
    shapes = annotate(monkeypatch, png, create(served.url, "images", shapes="mask"), "mask")
    for shape, mask in zip(shapes, [*masks(), *masks()], strict=True):
        decoded = decode_mask(shape.points, image_width=WIDTH, image_height=HEIGHT)
        assert shape.type.value == "mask" and (decoded == mask).all()


@pytest.mark.parametrize(("shapes", "options"), [("polygon", {}), ("mask", {"conv_mask_to_poly": True})])
def test_driver_annotates_polygons(served, png, monkeypatch, shapes, options):
    found = annotate(monkeypatch, png, create(served.url, "images", shapes=shapes), "polygon", **options)
    assert {shape.type.value for shape in found} == {"polygon"} and len(found) == 4
    assert all(len(shape.points) >= 6 and len(shape.points) % 2 == 0 for shape in found)


def test_pixels_reach_the_model_unchanged(served, png, monkeypatch):
    annotate(monkeypatch, png, create(served.url, "images"), "rectangle")
    sent = PIL.Image.open(io.BytesIO(served.torchserve.calls[-1][0]))
    assert (np.asarray(sent.convert("RGB")) == np.asarray(PIL.Image.open(io.BytesIO(png)))).all()


def saved(image: PIL.Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_picture_of_16_bits_is_sent_as_opencv_reads_it(served, monkeypatch):
    import cv2

    ramp = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)
    deep = cv2.imencode(".png", ramp)[1].tobytes()
    annotate(monkeypatch, deep, create(served.url, "images"), "rectangle")
    sent = np.asarray(PIL.Image.open(io.BytesIO(served.torchserve.calls[-1][0])).convert("RGB"))
    expected = cv2.imdecode(np.frombuffer(deep, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(sent.astype(int) - expected).max() <= 1 and sent.max() > sent.min()


def test_picture_that_exif_turns_is_sent_as_it_is_shown(served, monkeypatch):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = saved(PIL.Image.new("RGB", (HEIGHT, WIDTH)), exif=exif)  # stored lying, shown upright
    shapes = annotate(monkeypatch, turned, create(served.url, "images"), "rectangle")
    assert PIL.Image.open(io.BytesIO(served.torchserve.calls[-1][0])).size == (WIDTH, HEIGHT)
    assert shapes[1].points == [30.0, 10.0, 40.0, 30.0]  # clipped to 40 x 30


def test_box_beside_the_picture_is_left_out(served, monkeypatch):
    small = saved(PIL.Image.new("RGB", (24, 20)))
    shapes = annotate(monkeypatch, small, create(served.url, "images"), "rectangle")
    assert [shape.points for shape in shapes] == [[4.0, 6.0, 20.0, 18.0]] * 2  # the other begins at x = 30


def test_model_for_other_frames_and_unknown_shapes_are_refused(served):
    with pytest.raises(SettingsError, match="lidar"):
        create(served.url, "clouds")
    with pytest.raises(SettingsError, match="shapes"):
        create(served.url, "images", shapes="cuboid")


def test_cuboids_are_added_to_a_task_in_3d(served):
    uploaded: list[Any] = []
    cloud = np.zeros((5, 4), np.float32).tobytes()
    labels = [
        models.Label(id=i, name=name, type=kind, attributes=[], sublabels=[])
        for i, name, kind in ((9, "Car", "cuboid"), (10, "Pedestrian", "rectangle"))
    ]
    task = SimpleNamespace(
        size=3,
        get_meta=lambda: models.DataMetaRead(
            chunks_updated_date=datetime.now(UTC), frames=[], deleted_frames=[1]
        ),
        get_labels=lambda: labels,
        get_frame=lambda number, quality: io.BytesIO(cloud),
        update_annotations=lambda data, action: uploaded.append((data, action)),
    )
    with Client(served.url) as client:
        assert annotate_clouds(task, client, "clouds") == 2
        ((data, action),) = uploaded
        assert action.value == "create"
        assert [(shape.type.value, shape.label_id, shape.frame) for shape in data.shapes] == [
            ("cuboid", 9, 0), ("cuboid", 9, 2),
        ]  # fmt: skip
        x, y, z, dx, dy, dz, yaw = CUBOID
        expected = [x, y, z + dz / 2, 0, 0, yaw, dx, dy, dz, *[0] * 7]
        assert data.shapes[0].points == pytest.approx(expected)
        boxes_2d = client.predict(PNG, "images")
    with pytest.raises(BadRequest):
        cuboids(boxes_2d, {"Car": 9})


PNG = (lambda stream: (PIL.Image.new("RGB", (8, 8)).save(stream, "PNG"), stream.getvalue())[1])(io.BytesIO())
