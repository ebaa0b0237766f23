"""The page when something goes wrong: files, servers, models and keys that change beneath it."""

from __future__ import annotations

import json
import struct
import time

import numpy as np
import pytest

from tests.gateway.fake_torchserve import FakeModel
from tests.gateway.running import eventually
from tests.ui.conftest import make_cloud
from tests.ui.test_access import KEY, locked  # noqa: F401  # fixture
from tests.ui.test_images import grey_png
from tests.ui.test_page import found, open_frames


def info(page) -> str:
    return page.page.locator("#frame-info").inner_text()


def test_file_that_changed_after_it_was_opened_is_named(page, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(make_cloud().tobytes())
    page.page.locator("#files").set_input_files(path)
    page.page.locator("#found tbody tr").first.wait_for()
    path.write_bytes(b"other")
    page.page.get_by_text("Options of the requests").click()
    page.page.get_by_role("button", name="Send again").click()
    alert = page.page.get_by_role("alert")
    alert.get_by_text("a.bin: the file cannot be read: it was changed, moved or locked").wait_for()
    assert "cannot be reached" not in alert.inner_text()


def test_frames_that_failed_are_sent_again_and_no_other(page, torchserve):
    torchserve.models["second"]["1.0"].trouble = ""
    is_down = [True]

    def answer(route):
        if is_down[0] and len(seen) in (1, 2):
            seen.append(route.request)
            route.abort("connectionrefused")
        else:
            seen.append(route.request)
            route.continue_()

    seen: list[object] = []
    page.page.route("**/predictions/**", answer)
    page.drop(*[(f"{number}.bin", make_cloud(number).tobytes()) for number in range(4)])
    again = page.page.get_by_role("button", name="Send 2 failed frames again")
    again.wait_for()
    eventually(lambda: page.page.locator("#frames [data-state=done]").count() == 2)
    is_down[0] = False
    again.click()
    eventually(lambda: page.page.locator("#frames [data-state=done]").count() == 4)
    assert again.is_hidden() and len(seen) == 6


def test_model_that_goes_stays_chosen_and_nothing_is_sent_to_another(scene, torchserve, gateway, open_page):
    torchserve.models["other"] = {"2.0": FakeModel()}
    page = open_page(gateway.url)
    page.is_ready()
    choice = page.page.get_by_role("combobox", name="Model")
    eventually(lambda: choice.locator("option").count() == 2)
    choice.select_option("second 1.0")
    open_frames(page)
    calls = len(torchserve.calls)
    gone = torchserve.models.pop("second")
    eventually(lambda: '"second"' not in gateway.client.get("/models").text)
    page.page.locator("#server summary").click()
    eventually(lambda: choice.locator("option").all_inner_texts() == ["other 2.0", "second 1.0 (not ready)"])
    assert choice.input_value() == "second 1.0" and found(page) and len(torchserve.calls) == calls
    page.drop(("late.bin", make_cloud().tobytes()))
    page.page.get_by_role("alert").get_by_text("404 model_not_found").wait_for()
    torchserve.models["second"] = gone
    eventually(lambda: '"second"' in gateway.client.get("/models").text)
    page.page.locator("#server summary").click()
    eventually(lambda: choice.locator("option").all_inner_texts() == ["other 2.0", "second 1.0"])
    page.page.get_by_role("button", name="Send 1 failed frame again").click()
    page.page.locator("#frames [data-state=done]").wait_for()
    assert choice.input_value() == "second 1.0"


def test_sequence_keeps_its_pace_however_often_it_is_paused(page):
    count = 24
    open_frames(page, count)
    eventually(lambda: page.page.locator("#frames [data-state=done]").count() == count)
    page.page.get_by_role("spinbutton", name="Frames/s").fill("2")
    position = page.page.locator("#position")
    page.page.evaluate("for (let k = 0; k < 9; k++) document.querySelector('#play').click()")
    before = int(position.input_value())
    time.sleep(1.2)  # two frames, or three; five runs at once would be ten further
    assert int(position.input_value()) - before <= 5
    page.page.get_by_role("button", name="Pause").click()
    page.page.get_by_role("button", name="Play").wait_for()


def test_key_that_is_not_accepted_is_an_error_on_the_page(locked, open_page):  # noqa: F811
    page = open_page(locked.url)
    field = page.page.get_by_label("API key")
    field.fill("wrong")
    field.press("Enter")
    alert = page.page.get_by_role("alert")
    alert.get_by_text("does not accept this API key").wait_for()
    field.fill(KEY)
    field.press("Enter")
    page.is_ready()
    assert alert.inner_text() == ""


CALIBRATIONS = {
    b"{bad": "it is not JSON",
    b'{"lidar2img": [[NaN]]}': "it is not JSON",
    b'{"cam2img": [1, 2]}': "cam2img is [1,2]; send its rows",
    b'{"CAM_FRONT": {"lidar2img": "abc"}}': 'lidar2img is "abc"; send its rows',
}


def test_file_that_is_no_calibration_is_an_error_on_the_page(page):
    for body, sentence in CALIBRATIONS.items():
        page.drop(("8.bin", make_cloud().tobytes()), ("8.png", grey_png()), ("8.json", body))
        eventually(lambda sentence=sentence: f"8.json is not used here: {sentence}" in info(page))
    page.drop(("8.bin", make_cloud().tobytes()), ("8.png", grey_png()), ("8.txt", b"hello"))
    eventually(lambda: '8.txt is not used here: its text begins with "hello"' in info(page))


def pcd(count: int, encoding: str, body: bytes) -> bytes:
    head = "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {0}\nHEIGHT 1\nPOINTS {0}\nDATA {1}\n"
    return head.format(count, encoding).encode() + body


def claiming_npy() -> bytes:
    head = "{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000, 4), }".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + bytes(64)


MANY = 330_000_000
CLAIMS = {
    "a.npy": claiming_npy(),
    "compressed.pcd": pcd(MANY, "binary_compressed", struct.pack("<II", 9, 12 * MANY) + bytes(10)),
    "binary.pcd": pcd(MANY, "binary", bytes(100)),
    "ascii.pcd": pcd(MANY, "ascii", b"1 2 3\n"),
    "empty.ply": b"ply\nformat ascii 1.0\nelement vertex 4000000000\nend_header\n1 2\n",
    "other.ply": b"ply\nformat ascii 1.0\nelement other 4000000000\nelement vertex 1\nproperty float x\n"
    b"property float y\nproperty float z\nend_header\n1 2 3\n",
}


def test_header_that_claims_more_than_there_is_takes_no_memory(page):
    for name, body in CLAIMS.items():
        page.drop((name, body))
        page.page.locator("#frame-info").get_by_text(f"{name} is not shown: 4").wait_for(timeout=3000)
        assert "; send " in info(page), info(page)


def test_points_that_are_no_numbers_are_passed_over(page):
    cloud = make_cloud()
    cloud[::7] = np.nan
    page.drop(("some.bin", cloud.tobytes()))
    eventually(lambda: "x -5.0 to 45.0" in info(page))
    page.drop(("none.bin", np.full((9, 4), np.nan, "<f4").tobytes()))
    eventually(lambda: "no point has numbers as coordinates" in info(page))


@pytest.mark.parametrize("width", [320, 390])
def test_sequence_fits_a_narrow_window(scene, gateway, open_page, width):
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    page = open_page(gateway.url, viewport={"width": width, "height": 640})
    page.is_ready()
    open_frames(page, 12)
    page.page.locator("#server summary").click()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width


def test_documentation_below_a_prefix_calls_the_api_there(scene, gateway, open_page):
    page = open_page("about:blank")
    page.page.route(
        "**/below/**", lambda route: route.continue_(url=route.request.url.replace("/below/", "/"))
    )
    page.open(f"{gateway.url}/below/docs")
    page.page.get_by_role("button", name="GET /models Models").click()
    page.page.get_by_role("button", name="Try it out").click()
    page.page.get_by_role("button", name="Execute").click()
    page.page.locator(".response .response-col_status").get_by_text("200").wait_for()
    assert page.page.locator(".request-url").inner_text().endswith(f"{gateway.url}/below/models")


def test_names_are_text_and_nothing_else(page, monkeypatch):
    evil = '<img src=x onerror="window.ran=1">'
    answer = {
        "bboxes_3d": [[12.0, 3.0, -1.7, 4.2, 1.8, 1.6, 0.0]],
        "scores_3d": [0.9],
        "labels_3d": [0],
        "names": [evil],
        "classes": [evil],
        "warnings": [{"code": "x", "message": evil}],
    }
    monkeypatch.setattr(
        "tests.gateway.fake_torchserve.answer_for", lambda frame, options: json.dumps(answer).encode()
    )
    page.drop((f"{evil}.bin", make_cloud().tobytes()))
    page.page.locator("#found tbody").get_by_text(evil).wait_for()
    page.drop((f"{evil}.bin", b"bad!"))
    page.page.get_by_role("alert").get_by_text(evil).wait_for()
    assert page.page.evaluate("window.ran") is None and page.page.locator("main img").count() == 0


def test_latency_of_a_version_is_its_own(scene, torchserve, gateway, open_page):
    torchserve.models["second"]["2.0"] = FakeModel(default=False)
    page = open_page(gateway.url)
    page.is_ready()
    choice = page.page.get_by_role("combobox", name="Model")
    eventually(lambda: choice.locator("option").count() == 2)
    choice.select_option("second 1.0")
    open_frames(page)
    page.page.locator("#server summary").click()
    row = page.page.locator("#server-models tr")
    eventually(lambda: "ms" in row.filter(has_text="second 1.0").inner_text())
    assert row.filter(has_text="second 2.0").locator("td").all_inner_texts()[-2:] == ["–", "–"]
