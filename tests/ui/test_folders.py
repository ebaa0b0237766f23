"""Folders on the page: which files belong to one frame, which to another, and which to none."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.gateway.fake_torchserve import IMAGES, FakeModel
from tests.gateway.running import eventually
from tests.ui.conftest import make_cloud
from tests.ui.test_images import CALIBRATION, KITTI, count, grey_png, seen

CAR = (255, 159, 67)


def write_tree(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def open_folder(page, folder: Path) -> None:
    page.page.locator("#folder").set_input_files(folder)
    page.page.locator("#frames button").first.wait_for()
    waiting = page.page.locator("#frames [data-state=waiting], #frames [data-state=running]")
    eventually(lambda: waiting.count() == 0)


def names(page) -> list[str]:
    return page.page.locator("#frames .name").all_inner_texts()


def test_frames_of_two_drives_in_kittis_folders_stay_apart(page, torchserve, tmp_path):
    files = {}
    for drive, number in (("drive_1", 0), ("drive_2", 2)):
        files |= {
            f"{drive}/velodyne/000008.bin": make_cloud(number).tobytes(),
            f"{drive}/image_2/000008.png": grey_png(),
            f"{drive}/image_3/000008.png": grey_png(),
            f"{drive}/calib/000008.txt": KITTI + KITTI.replace("P0", "P1").replace("P2", "P3"),
            f"{drive}/label_2/000008.txt": "Car 0.00 0 -1.58 587 173 614 200 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59",
        }
    files |= {"README.md": "about", "ImageSets/train.txt": "000008"}
    open_folder(page, write_tree(tmp_path / "kitti", files))
    assert names(page) == ["drive_1/000008", "drive_2/000008"]
    assert page.page.locator("#left-out").inner_text() == "1 file of other kinds left out"
    assert page.page.get_by_role("alert").inner_text() == ""
    assert [len(body) for batch in torchserve.calls for body in batch] == [len(make_cloud().tobytes())] * 2
    page.page.get_by_role("checkbox", name="Names").uncheck()
    page.page.get_by_role("button", name="drive_2/000008").click()
    eventually(lambda: "image_3 600 × 400" in page.page.locator("#frame-info").inner_text())
    eventually(lambda: page.rows() and "12.5, 3.0" in page.rows()[0])  # two steps on: the cloud of drive_2
    eventually(lambda: count(seen(page), CAR) > 200)  # in both images, each by its own projection


def test_frames_in_folders_within_folders_are_told_apart(page, tmp_path):
    paths = ("a/1/0.bin", "a/2/0.bin", "b/1/0.bin", "b/1/1.bin")
    open_folder(page, write_tree(tmp_path / "deep", {path: make_cloud().tobytes() for path in paths}))
    assert names(page) == ["a/1/0.bin", "a/2/0.bin", "b/1/0.bin", "1.bin"]


def test_calibration_beside_frames_of_other_names_is_that_of_each(page, tmp_path):
    calibration = json.dumps(CALIBRATION)
    files: dict[str, bytes | str] = {"calibration.json": calibration}
    for number in range(2):
        files |= {
            f"{number:06}.bin": make_cloud(number).tobytes(),
            f"{number:06}.png": grey_png(),
        }
    open_folder(page, write_tree(tmp_path / "drive", files))
    assert names(page) == ["000000", "000001"]
    page.page.get_by_role("checkbox", name="Names").uncheck()
    for number in range(2):
        page.page.locator("#frames button").nth(number).click()
        page.page.locator("#position-text").get_by_text(f"{number + 1} / 2").wait_for()
        eventually(lambda: count(seen(page), CAR) > 100)


def test_folder_with_one_cloud_one_image_and_a_calibration_is_one_frame(page, tmp_path):
    files: dict[str, bytes | str] = {"calibration.json": "{}", "scan.bin": make_cloud().tobytes()}
    files["street.png"] = grey_png()
    open_folder(page, write_tree(tmp_path / "one", files))
    assert names(page) == ["one"]


DROP_TWO = """async () => {
    const transfer = new DataTransfer();
    for (const count of [2000000, 1000]) transfer.items.add(new File([new Float32Array(4 * count)], "a.bin"));
    document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
    const second = () => document.querySelectorAll("#frames button")[1];
    while (!second()) await new Promise((resolve) => setTimeout(resolve));
    second().click();  // while the first, a large one, is read
}"""


def test_of_two_files_of_one_name_the_chosen_one_is_drawn(page):
    page.page.evaluate(DROP_TWO)
    page.page.locator("#frames [data-state=done]").nth(1).wait_for()
    assert names(page) == ["a.bin", "a.bin"]
    page.page.locator("#frame-info").get_by_text("1,000 points").wait_for()
    eventually(lambda: page.page.locator("#cloud").get_attribute("data-drawn") == "1000")


@pytest.mark.parametrize(
    "name", ["a b'c\"d&<b>.bin", "点群 雨.bin", "100%25.bin", "a#b?c.bin", "CLOUD.BIN", "cloud"]
)
def test_frame_of_any_name_is_sent_and_named(page, name):
    page.drop((name, make_cloud().tobytes()))
    page.page.locator("#found tbody tr").first.wait_for()
    assert names(page) == [name]
    page.page.locator("#frame-info").get_by_text("5,200 points").wait_for()


DROP_AND_ZOOM = """bytes => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "large.png"));
    document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
    const zoom = () => {
        document.querySelector("#images").dispatchEvent(new WheelEvent("wheel", { deltaY: -20, cancelable: true }));
        if (!document.querySelector("#frame-info").textContent.includes("9000")) requestAnimationFrame(zoom);
    };
    zoom();
}"""


def test_picture_may_be_zoomed_while_the_next_one_is_read(torchserve, gateway, open_page):
    torchserve.models = {"images": {"1.0": FakeModel(spec=dict(IMAGES))}}
    page = open_page(gateway.url)
    page.is_ready()
    page.drop(("small.png", grey_png()))
    page.page.locator("#frame-info").get_by_text("600 × 400").wait_for()
    stream = io.BytesIO()
    Image.new("RGB", (9000, 6000)).save(stream, "PNG")
    page.page.evaluate(DROP_AND_ZOOM, list(stream.getvalue()))
    page.page.locator("#frame-info").get_by_text("9000 × 6000").wait_for()  # and no error on the page
