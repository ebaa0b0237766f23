"""What is drawn is where it is: corners of boxes at their pixels, pictures turned as the model sees them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from serve.protocol.images import decode_image
from tests.gateway.fake_torchserve import CLOUDS, IMAGES, FakeModel
from tests.gateway.running import eventually
from tests.ui.conftest import make_cloud
from tests.ui.test_images import (
    CALIBRATION,
    HEIGHT,
    WIDTH,
    grey_png,
    image_answer,
    opened,
    run_lengths,
    seen,
    use,
)

CAR = (255, 159, 67)
# A box of each kind and its corners, computed by mmdet3d 1.4 (`LiDAR-`, `Camera-`, `DepthInstance3DBoxes.corners`).
LIDAR = [12.0, 3.0, -1.7, 4.2, 1.8, 1.6, 2.5]
LIDAR_CORNERS = [
    (x, y, z)
    for x, y in ((14.2210, 2.4642), (13.1438, 1.0222), (10.8562, 4.9778), (9.7790, 3.5358))
    for z in (-1.7, -0.1)
]
CAMERA = [1.0, 1.5, 12.0, 4.0, 1.5, 1.8, 0.7]
CAMERA_CORNERS = [
    (x, y, z)
    for x, z in ((-1.1095, 12.6001), (0.0501, 13.9768), (1.9499, 10.0232), (3.1095, 11.3999))
    for y in (0.0, 1.5)
]
DEPTH = [0.5, 6.0, -0.6, 2.0, 1.0, 0.8, -0.9]
DEPTH_CORNERS = [
    (x, y, z)
    for x, y in ((-0.5133, 6.4725), (0.2701, 7.0941), (0.7299, 4.9059), (1.5133, 5.5275))
    for z in (-0.6, 0.2)
]
CAM2IMG = np.array(CALIBRATION["cam2img"], float)
# From a room's frame (x right, y forward, z up) to pixels.
DEPTH2IMG = CAM2IMG @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], float)
PROJECTIONS = {
    "LiDAR": CAM2IMG @ np.array(CALIBRATION["lidar2cam"], float)[:3, :3],
    "Camera": CAM2IMG,
    "Depth": DEPTH2IMG,
}


def answer_of(box: list[float], kind: str) -> bytes:
    found = {"bboxes_3d": [box], "scores_3d": [0.9], "labels_3d": [0], "names": ["Car"]}
    return json.dumps({**found, "box_type_3d": kind, "classes": ["Car"]}).encode()


def box_of(picture: np.ndarray, colour=CAR) -> tuple[np.ndarray, np.ndarray]:
    """First and last (row, column) of a colour."""
    there = np.argwhere(abs(picture - colour).max(2) < 25)
    return there.min(0), there.max(0)


def is_drawn_at(picture: np.ndarray, pixels: np.ndarray, colour=CAR, reach: int = 3) -> bool:
    """Whether every one of the (N, 2) pixels (column, row) has the colour near it."""
    is_there = abs(picture - colour).max(2) < 25
    return all(
        is_there[
            max(int(v) - reach, 0) : int(v) + reach + 1, max(int(u) - reach, 0) : int(u) + reach + 1
        ].any()
        for u, v in pixels
    )


@pytest.mark.parametrize(
    ("kind", "box", "corners"),
    [("LiDAR", LIDAR, LIDAR_CORNERS), ("Camera", CAMERA, CAMERA_CORNERS), ("Depth", DEPTH, DEPTH_CORNERS)],
)
def test_corners_of_a_box_are_drawn_at_their_pixels_of_the_image(
    torchserve, monkeypatch, gateway, open_page, kind, box, corners
):
    spec = {**IMAGES, "box_type_3d": kind}
    use(torchserve, monkeypatch, spec, lambda frame, options: answer_of(box, kind))
    page = opened(torchserve, gateway, open_page)
    calibration = json.dumps({**CALIBRATION, "depth2img": DEPTH2IMG.tolist()}).encode()
    page.drop(("8.png", grey_png()), ("8.json", calibration))
    page.page.locator("#found tbody tr").first.wait_for()
    page.page.get_by_role("checkbox", name="Names").uncheck()
    eventually(lambda: (abs(seen(page) - CAR).max(2) < 25).sum() > 100)
    drawn = seen(page)
    grey = np.argwhere(abs(drawn - 128).max(2) < 3)
    (top, left), (bottom, right) = grey.min(0), grey.max(0) + 1
    projected = np.array(corners) @ PROJECTIONS[kind].T
    pixels = projected[:, :2] / projected[:, 2:] * [(right - left) / WIDTH, (bottom - top) / HEIGHT] + [
        left,
        top,
    ]
    assert is_drawn_at(drawn, pixels)


def cloud_view(reach_m: float, forward: tuple[float, float], width: int, height: int) -> np.ndarray:
    """(3, 4) matrix to pixels of the view at its start: from behind and above the sensor, 55° high."""
    ahead = np.array([*forward, 0.0])
    eye, target = -0.45 * reach_m * ahead + [0, 0, 0.5 * reach_m], 0.35 * reach_m * ahead
    z = (target - eye) / np.linalg.norm(target - eye)
    x = np.cross(z, [0, 0, 1])
    x /= np.linalg.norm(x)
    focal = height / 2 / np.tan(np.radians(55) / 2)
    turn = np.stack([x, np.cross(z, x), z])
    inner = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return inner @ np.column_stack([turn, -turn @ eye])


@pytest.mark.parametrize(
    ("kind", "box", "corners", "forward"),
    [("LiDAR", LIDAR, LIDAR_CORNERS, (1, 0)), ("Depth", DEPTH, DEPTH_CORNERS, (0, 1))],
)
def test_corners_of_a_box_are_drawn_at_their_pixels_of_the_view(
    torchserve, monkeypatch, gateway, open_page, kind, box, corners, forward
):
    spec = {**CLOUDS, "modality": "depth" if kind == "Depth" else "lidar", "box_type_3d": kind}
    use(torchserve, monkeypatch, spec, lambda frame, options: answer_of(box, kind))
    page = opened(torchserve, gateway, open_page)
    cloud = np.zeros((100, 4), "<f4")
    cloud[:, :2] = np.array(forward) * 20  # all of them 20 m ahead: the view is made for that
    page.drop(("8.bin", cloud.tobytes()))
    page.page.locator("#found tbody tr").first.wait_for()
    page.page.get_by_role("checkbox", name="Names").uncheck()
    eventually(lambda: (abs(seen(page, "#cloud") - CAR).max(2) < 25).sum() > 50)
    drawn = seen(page, "#cloud")
    height, width = drawn.shape[:2]
    matrix = cloud_view(20, forward, width, height)
    projected = np.column_stack([corners, np.ones(8)]) @ matrix.T
    assert is_drawn_at(drawn, projected[:, :2] / projected[:, 2:])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff"])
def test_picture_is_turned_as_the_model_sees_it(torchserve, monkeypatch, gateway, open_page, suffix):
    if suffix == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow writes no AVIF")
    whole = Image.new("RGB", (90, 60), (128, 128, 128))
    whole.paste((255, 0, 0), (0, 0, 45, 30))
    turned = Image.Exif()
    turned[0x0112] = 6  # Orientation: a quarter turn clockwise
    stream = io.BytesIO()
    whole.save(stream, "JPEG" if suffix == "jpg" else suffix.upper(), exif=turned.tobytes(), quality=95)
    if suffix == "tiff":
        stream = io.BytesIO()
        whole.save(stream, "TIFF", tiffinfo={0x0112: 6})
    expected = decode_image(stream.getvalue(), "color", "cv2", 10_000)[..., ::-1].astype(int)
    use(torchserve, monkeypatch, IMAGES, image_answer)
    page = opened(torchserve, gateway, open_page)
    page.page.get_by_role("slider", name="Score from").fill("1")
    page.drop((f"turned.{suffix}", stream.getvalue()))
    height, width = expected.shape[:2]
    page.page.locator("#frame-info").get_by_text(f"{width} × {height} pixels").wait_for()
    eventually(lambda: (abs(seen(page) - (255, 0, 0)).max(2) < 40).sum() > 1000)
    drawn = seen(page)
    everything = np.argwhere(drawn.max(2) > 100)
    (top, left), (bottom, right) = everything.min(0), everything.max(0)
    red = np.argwhere(abs(drawn - (255, 0, 0)).max(2) < 40).mean(0)
    share = (red - [top, left]) / [bottom - top, right - left]
    is_red = abs(expected - (255, 0, 0)).max(2) < 40
    assert share == pytest.approx(np.argwhere(is_red).mean(0) / [height, width], abs=0.05)


def test_points_have_one_size_on_screens_of_any_density(scene, gateway, open_page):
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    shares = []
    for density in (1, 2):
        page = open_page(gateway.url, device_scale_factor=density)
        page.is_ready()
        page.page.get_by_role("slider", name="Score from").fill("1")
        page.drop(("8.bin", make_cloud().tobytes()))
        page.page.locator("#frame-info").get_by_text("5,200 points").wait_for()
        eventually(lambda page=page: page.page.locator("#cloud").get_attribute("data-drawn") == "5200")
        shares.append(float((seen(page, "#cloud").max(2) > 110).mean()))
    assert 0.6 < shares[1] / shares[0] < 1.7, shares


COUNT_BITMAPS = """
window.bitmaps = 0;
const real = window.createImageBitmap;
window.createImageBitmap = async (...given) => { window.bitmaps++; return real(...given); };
const close = ImageBitmap.prototype.close;
ImageBitmap.prototype.close = function () { if (this.width) window.bitmaps--; close.call(this); };
"""


def test_masks_of_a_sequence_are_not_kept_for_ever(torchserve, monkeypatch, gateway, open_page):
    side = 1500
    mask = run_lengths(np.ones((side, side), bool))
    answer = {
        "bboxes": [[0, 0, side, side]],
        "scores": [0.9],
        "labels": [2],
        "names": ["car"],
        "masks": [mask],
    }
    use(torchserve, monkeypatch, IMAGES, lambda frame, options: json.dumps(answer).encode())
    page = open_page("about:blank")
    page.page.add_init_script(COUNT_BITMAPS)
    page.open(gateway.url)
    page.is_ready()
    count = 24
    page.drop(*[(f"{number:02}.png", grey_png()) for number in range(count)])
    page.page.get_by_role("spinbutton", name="Frames/s").fill("30")
    page.page.get_by_role("button", name="Play").click()
    page.page.locator("#position-text").get_by_text(f"{count} / {count}").wait_for()
    # Six decoded frames, and masks of 16 million pixels.
    eventually(lambda: 0 < page.page.evaluate("bitmaps") <= 6 + 1 + 16_000_000 // side**2 + 1)


def test_dropped_graphics_context_is_drawn_again_when_it_comes_back(page):
    page.drop(("8.bin", make_cloud().tobytes()))
    page.page.locator("#found tbody tr").first.wait_for()
    page.page.get_by_role("checkbox", name="Names").uncheck()
    eventually(lambda: (abs(seen(page, "#cloud") - CAR).max(2) < 25).sum() > 300)
    before = seen(page, "#cloud")
    page.page.evaluate(
        "window.context = document.querySelector('#cloud').getContext('webgl2').getExtension('WEBGL_lose_context');"
        "context.loseContext()"
    )
    page.page.get_by_role("alert").get_by_text("WebGL context lost").wait_for()
    page.page.evaluate("context.restoreContext()")
    eventually(lambda: (abs(seen(page, "#cloud") - before).max(2) > 20).sum() < 100)
    assert page.page.get_by_role("alert").inner_text() == ""


def test_labels_beyond_the_texels_have_the_colours_of_their_classes(
    torchserve, monkeypatch, gateway, open_page
):
    answer = json.loads(answer_of(LIDAR, "LiDAR"))
    answer |= {"labels_3d": [300], "names": ["c300"]}  # 300 modulo 12 colours is 0
    use(torchserve, monkeypatch, CLOUDS, lambda frame, options: json.dumps(answer).encode())
    page = opened(torchserve, gateway, open_page)
    inside = np.tile(np.array([[12.0, 3.0, -0.9, 0.0]], "<f4"), (500, 1))
    inside[:, :3] += np.random.default_rng(0).normal(0, 0.2, (500, 3))
    page.drop(("8.bin", np.concatenate([make_cloud(), inside]).astype("<f4").tobytes()))
    page.page.locator("#found tbody tr").first.wait_for()
    page.page.get_by_role("checkbox", name="Names").uncheck()
    page.page.get_by_role("slider", name="Size of points").fill("6")

    def coloured() -> int:
        return int((abs(seen(page, "#cloud") - CAR).max(2) < 12).sum())

    lines = coloured()
    page.page.get_by_role("combobox", name="Colour by").select_option("class")
    eventually(lambda: coloured() > lines + 200)


def test_velocity_that_is_none_leaves_its_box_drawn(torchserve, monkeypatch, gateway, open_page):
    torchserve.models = {"nuscenes": {"1.0": FakeModel()}}
    answer = json.loads(answer_of([*LIDAR, 0.5, 0.0], "LiDAR"))
    answer["bboxes_3d"][0][8] = None
    use(torchserve, monkeypatch, CLOUDS, lambda frame, options: json.dumps(answer).encode())
    page = opened(torchserve, gateway, open_page)
    page.drop(("8.bin", make_cloud().tobytes()))
    page.page.locator("#found tbody").get_by_text("12.0, 3.0, -1.7 m").wait_for()
    eventually(lambda: (abs(seen(page, "#cloud") - CAR).max(2) < 25).sum() > 100)
