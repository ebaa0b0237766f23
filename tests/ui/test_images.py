"""Images, frames of several parts, segments and labels of points in the browser."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import orjson
import pytest
from PIL import Image
from pycocotools import mask as coco

from serve.compare.labels import encode_labels
from tests.gateway.fake_torchserve import CLOUDS, FUSION, IMAGES, FakeModel
from tests.gateway.running import eventually
from tests.ui.conftest import make_cloud

CAR, PERSON = (124, 226, 110), (255, 159, 67)  # colours of labels 2 and 0
WIDTH, HEIGHT = 600, 400
CALIBRATION = {
    "cam2img": [[400, 0, WIDTH / 2], [0, 400, HEIGHT / 2], [0, 0, 1]],
    "lidar2cam": [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
}
KITTI = f"""P0: {"0 " * 12}
P2: 400 0 {WIDTH / 2} 0 0 400 {HEIGHT / 2} 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0
"""


def grey_png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)).save(stream, "PNG")
    return stream.getvalue()


def grey_tiff() -> bytes:
    """Sixteen bits, which no browser reads."""
    stream = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH), 128 << 8, np.uint16)).save(stream, "TIFF")
    return stream.getvalue()


def run_lengths(mask: np.ndarray) -> dict:
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in packed["size"]], "counts": packed["counts"].decode()}


def masks() -> list[np.ndarray]:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ring = np.hypot(rows - 200, columns - 450)
    return [(columns >= 100) & (columns < 220) & (rows >= 150) & (rows < 250), (ring < 80) & (ring > 30)]


def image_answer(frame, options) -> bytes:
    return orjson.dumps(
        {
            "bboxes": [[100, 150, 220, 250], [370, 120, 530, 280]],
            "scores": [0.93, 0.55],
            "labels": [2, 0],
            "names": ["car", "person"],
            "masks": [run_lengths(mask) for mask in masks()],
            "classes": ["person", "bicycle", "car"],
        }
    )


def use(torchserve, monkeypatch, spec, answer) -> None:
    torchserve.models = {"model": {"1.0": FakeModel(spec=dict(spec))}}
    if answer is not None:
        monkeypatch.setattr("tests.gateway.fake_torchserve.answer_for", answer)


def opened(torchserve, gateway, open_page):
    # A gateway that has just started may list what was there before `use` for a second.
    eventually(
        lambda: {each["name"] for each in gateway.client.get("/models").json()} == {*torchserve.models}
    )
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    page = open_page(gateway.url)
    page.is_ready()
    return page


def seen(page, selector: str = "#images") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.page.locator(selector).screenshot())).convert("RGB")).astype(
        int
    )


def count(picture: np.ndarray, colour) -> int:
    return int((abs(picture - colour).max(2) < 10).sum())


def mixed(colour) -> np.ndarray:
    """Half of a colour over grey, as masks are drawn."""
    return (np.array(colour) + 128) // 2


@pytest.mark.parametrize(("name", "encode"), [("street.png", grey_png), ("street.tif", grey_tiff)])
def test_masks_and_boxes_of_an_image_are_drawn(torchserve, monkeypatch, gateway, open_page, name, encode):
    use(torchserve, monkeypatch, IMAGES, image_answer)
    page = opened(torchserve, gateway, open_page)
    page.drop((name, encode()))
    page.page.locator("#found tbody tr").first.wait_for()
    assert [row.split()[:2] for row in page.rows()] == [["car", "0.93"], ["person", "0.55"]]
    page.page.get_by_role("checkbox", name="Names").uncheck()
    eventually(lambda: count(seen(page), mixed(CAR)) > 1000)
    picture = seen(page)
    scale = (count(picture, (128, 128, 128)) + sum(count(picture, mixed(c)) for c in (CAR, PERSON))) / (
        WIDTH * HEIGHT
    )
    for colour, mask in zip((CAR, PERSON), masks(), strict=True):
        assert count(picture, mixed(colour)) == pytest.approx(mask.sum() * scale, rel=0.06)
    page.page.get_by_role("slider", name="Score from").fill("0.6")
    eventually(lambda: count(seen(page), mixed(PERSON)) == 0)
    assert count(seen(page), mixed(CAR)) > 1000
    assert len(torchserve.calls) == 1


def test_image_is_zoomed_by_keys(torchserve, monkeypatch, gateway, open_page):
    use(torchserve, monkeypatch, IMAGES, image_answer)
    page = opened(torchserve, gateway, open_page)
    page.drop(("street.png", grey_png()))
    page.page.locator("#found tbody tr").first.wait_for()
    eventually(lambda: count(seen(page), mixed(PERSON)) > 1000)
    before = count(seen(page), mixed(PERSON))
    page.page.locator("#images").focus()
    for _ in range(3):
        page.page.keyboard.press("+")
    eventually(lambda: count(seen(page), mixed(PERSON)) > 1.2 * before)
    page.page.get_by_role("button", name="Reset view").click()
    eventually(lambda: abs(count(seen(page), mixed(PERSON)) - before) < 20)


@pytest.mark.parametrize("calibration", [json.dumps(CALIBRATION), KITTI], ids=["json", "kitti"])
def test_boxes_of_a_lidar_model_are_drawn_into_the_image_beside_its_cloud(
    scene, torchserve, gateway, open_page, calibration
):
    page = opened(torchserve, gateway, open_page)
    suffix = "json" if calibration.startswith("{") else "txt"
    page.drop(
        ("000008.bin", make_cloud().tobytes()),
        ("000008.png", grey_png()),
        (f"000008.{suffix}", calibration.encode()),
    )
    page.page.locator("#found tbody tr").first.wait_for()
    assert page.page.locator("#views").get_attribute("data-views") == "cloud images"
    eventually(lambda: count(seen(page), (255, 159, 67)) > 100)
    assert count(seen(page, "#cloud"), (255, 159, 67)) > 100
    assert torchserve.calls == [[make_cloud().tobytes()]]  # the model takes the cloud alone
    # The nearer car is left of the middle: y is 3 m to the left, 12 m ahead.
    page.page.get_by_role("checkbox", name="Names").uncheck()
    page.page.get_by_role("slider", name="Score from").fill("0.9")
    drawn = seen(page)
    columns = np.argwhere(abs(drawn - (255, 159, 67)).max(2) < 10)[:, 1]
    image_columns = np.argwhere(abs(drawn - 128).max(2) < 3)[:, 1]
    left, right = image_columns.min(), image_columns.max()
    expected = left + (WIDTH / 2 - 400 * 3 / 12) / WIDTH * (right - left)
    assert columns.mean() == pytest.approx(expected, abs=0.05 * (right - left))


def test_frame_of_several_parts_is_sent_as_such(scene, torchserve, monkeypatch, gateway, open_page, tmp_path):
    use(torchserve, monkeypatch, FUSION, None)
    parts = {
        "points.bin": make_cloud().tobytes(),
        "image.png": grey_png(),
        "calibration.json": json.dumps(CALIBRATION).encode(),
    }
    for number in range(2):
        folder = tmp_path / "drive" / f"frame{number}"
        folder.mkdir(parents=True)
        for name, body in parts.items():
            (folder / name).write_bytes(body)
    page = opened(torchserve, gateway, open_page)
    page.page.locator("#folder").set_input_files(tmp_path / "drive")
    page.page.locator("#frames [data-state=done]").nth(1).wait_for()
    assert page.page.locator("#frames .name").all_inner_texts() == ["frame0", "frame1"]
    assert sorted(map(len, torchserve.calls[0])) == [sum(map(len, parts.values()))]


def test_calibration_of_kitti_is_sent_as_json(scene, torchserve, monkeypatch, gateway, open_page):
    use(torchserve, monkeypatch, FUSION, None)
    page = opened(torchserve, gateway, open_page)
    page.drop(("8.bin", make_cloud().tobytes()), ("8.png", grey_png()), ("8.txt", KITTI.encode()))
    page.page.locator("#frames [data-state=done]").wait_for()
    (sent,) = torchserve.calls[0]
    text = sent[sent.rindex(b'{"cam2img"') :].decode("latin-1")
    matrices, _ = json.JSONDecoder().raw_decode(text)
    np.testing.assert_allclose(matrices["lidar2cam"], CALIBRATION["lidar2cam"])
    np.testing.assert_allclose(np.array(matrices["cam2img"])[:3, :3], CALIBRATION["cam2img"])


def test_incomplete_frame_is_sent_with_the_parts_that_there_are(
    scene, torchserve, monkeypatch, gateway, open_page
):
    use(torchserve, monkeypatch, FUSION, None)
    page = opened(torchserve, gateway, open_page)
    page.drop(("a.bin", make_cloud().tobytes()), ("a.png", grey_png()))
    page.page.locator("#frames [data-state=done]").wait_for()
    # The parts that there are: a real worker answers 400 and names the one that is missing.
    assert [len(frame) for frame in torchserve.calls[0]] == [len(make_cloud().tobytes()) + len(grey_png())]


def test_segments_of_a_panoptic_model_are_drawn_and_filtered(torchserve, monkeypatch, gateway, open_page):
    ids = np.zeros((HEIGHT, WIDTH), np.uint32)
    ids[:, : WIDTH // 2] = 70_000  # needs all three channels
    ids[300:, WIDTH // 2 :] = 5

    def answer(frame, options) -> bytes:
        channels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(channels).save(stream, "PNG")
        segments = [
            {
                "id": 70_000,
                "category_id": 2,
                "name": "car",
                "isthing": True,
                "area": 120_000,
                "bbox": [0, 0, 300, 400],
            },
            {
                "id": 5,
                "category_id": 0,
                "name": "road",
                "isthing": False,
                "area": 30_000,
                "bbox": [300, 300, 300, 100],
            },
        ]
        encoded = base64.b64encode(stream.getvalue()).decode()
        return orjson.dumps(
            {
                "panoptic_seg": {"size": [HEIGHT, WIDTH], "png_b64": encoded},
                "segments_info": segments,
                "classes": [],
            }
        )

    use(torchserve, monkeypatch, IMAGES, answer)
    page = opened(torchserve, gateway, open_page)
    page.drop(("street.png", grey_png()))
    page.page.locator("#found tbody tr").first.wait_for()
    assert [row.split()[0] for row in page.rows()] == ["car", "road"]
    eventually(lambda: count(seen(page), mixed(CAR)) > 3 * count(seen(page), mixed(PERSON)) > 1000)
    page.page.get_by_role("checkbox", name="car").uncheck()
    eventually(lambda: count(seen(page), mixed(CAR)) == 0)


def test_labels_of_points_are_their_colours(torchserve, monkeypatch, gateway, open_page):
    labels = np.arange(5200) % 3

    def answer(frame, options) -> bytes:
        return orjson.dumps(
            {"pts_semantic_mask": encode_labels(labels), "classes": ["wall", "floor", "chair"]}
        )

    use(torchserve, monkeypatch, {**CLOUDS, "modality": "depth", "box_type_3d": None}, answer)
    page = opened(torchserve, gateway, open_page)
    page.drop(("room.bin", make_cloud().tobytes()))
    page.page.get_by_role("checkbox", name="chair (1,733)").wait_for()
    page.page.get_by_role("combobox", name="Colour by").select_option("class")
    page.page.get_by_role("slider", name="Size of points").fill("5")
    eventually(lambda: count(seen(page, "#cloud"), CAR) > 500)
    page.page.get_by_role("checkbox", name="chair").uncheck()
    eventually(lambda: count(seen(page, "#cloud"), CAR) == 0)


def test_boxes_of_camera_coordinates_are_drawn_without_a_cloud(torchserve, monkeypatch, gateway, open_page):
    def answer(frame, options) -> bytes:
        box = [1.0, 1.5, 12.0, 4.0, 1.5, 1.8, 0.3]  # right, down, forward; length, height, width
        found = {"bboxes_3d": [box], "scores_3d": [0.8], "labels_3d": [0], "names": ["Car"]}
        return orjson.dumps({**found, "box_type_3d": "Camera", "classes": ["Car"]})

    spec = {**FUSION, "modality": "mono3d", "parts": ["image", "calibration"], "box_type_3d": "Camera"}
    use(torchserve, monkeypatch, spec, answer)
    page = opened(torchserve, gateway, open_page)
    page.drop(("a.png", grey_png()), ("a.json", json.dumps({"cam2img": CALIBRATION["cam2img"]}).encode()))
    page.page.locator("#found tbody tr").first.wait_for()
    eventually(lambda: count(seen(page), (255, 159, 67)) > 100)
    assert count(seen(page, "#cloud"), (255, 159, 67)) > 100


def test_box_that_reaches_behind_the_camera_is_drawn_as_far_as_it_is_seen(
    scene, torchserve, gateway, open_page, monkeypatch
):
    def answer(frame, options):
        boxes = [[1.0, 1.5, -1.7, 6, 1.8, 1.6, 0], [-12.0, 3.0, -1.7, 4.2, 1.8, 1.6, 0.2]]
        labels = {"scores_3d": [0.9, 0.8], "labels_3d": [0, 1], "names": ["Car", "Pedestrian"]}
        return orjson.dumps(
            {"bboxes_3d": boxes, **labels, "box_type_3d": "LiDAR", "classes": ["Car", "Pedestrian"]}
        )

    monkeypatch.setattr("tests.gateway.fake_torchserve.answer_for", answer)
    page = opened(torchserve, gateway, open_page)
    page.drop(
        ("8.bin", make_cloud().tobytes()),
        ("8.png", grey_png()),
        ("8.json", json.dumps(CALIBRATION).encode()),
    )
    page.page.locator("#found tbody tr").first.wait_for()
    page.page.get_by_role("checkbox", name="Names").uncheck()
    eventually(lambda: count(seen(page), (255, 159, 67)) > 100)
    assert count(seen(page), (255, 92, 150)) == 0  # wholly behind


def test_boxes_of_a_camera_model_stand_in_a_cloud_of_other_axes(torchserve, gateway, open_page, monkeypatch):
    # The cloud has x right and y forward, as nuScenes has it; the camera is 2 m in front of its origin.
    lidar2cam = [[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, -2], [0, 0, 0, 1]]
    calibration = {"cam2img": CALIBRATION["cam2img"], "lidar2cam": lidar2cam}

    def answer(frame, options):
        box = [-3.0, 1.6, 10.0, 4.2, 1.5, 1.8, 0.0]  # 3 m left of the camera, 10 m ahead
        return orjson.dumps(
            {
                "bboxes_3d": [box],
                "scores_3d": [0.9],
                "labels_3d": [0],
                "names": ["Car"],
                "box_type_3d": "Camera",
            }
        )

    spec = {**IMAGES, "parts": ["image", "calibration"], "modality": "mono3d", "box_type_3d": "Camera"}
    use(torchserve, monkeypatch, spec, answer)
    page = opened(torchserve, gateway, open_page)
    inside = np.array([[-3.0, 12.0, -0.9, 1.0]] * 500, np.float32)  # where that is in the cloud
    cloud = np.concatenate([make_cloud(), inside + np.random.default_rng(0).normal(0, 0.2, inside.shape)])
    page.drop(
        ("8.bin", cloud.astype("<f4").tobytes()),
        ("8.png", grey_png()),
        ("8.json", json.dumps(calibration).encode()),
    )
    page.page.locator("#found tbody button").first.click()
    page.page.get_by_role("checkbox", name="Names").uncheck()
    page.page.get_by_role("combobox", name="Colour by").select_option("intensity")
    # Looked at from nearby, the points of the highest intensity are within the box's lines.
    eventually(lambda: count(seen(page, "#cloud"), (253, 231, 60)) > 50)
    drawn = seen(page, "#cloud")
    lines = np.argwhere(abs(drawn - (255, 159, 67)).max(2) < 10)
    points = np.argwhere(abs(drawn - (253, 231, 60)).max(2) < 10)
    assert (lines.min(0) < np.median(points, 0)).all() and (np.median(points, 0) < lines.max(0)).all()
