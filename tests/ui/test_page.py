"""The page in a browser: what its user sees and does with clouds."""

from __future__ import annotations

import io
import json
import time
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.gateway.fake_torchserve import FakeModel
from tests.gateway.running import eventually
from tests.ui.conftest import BOXES, STEP_M, make_cloud, scene_answer

FIRST_THREE = [["Car", "0.91"], ["Car", "0.62"], ["Pedestrian", "0.45"]]


def found(page) -> list[list[str]]:
    return [row.split()[:2] for row in page.rows()]


def open_frames(page, count: int = 1) -> None:
    page.drop(*[(f"{number:06}.bin", make_cloud(number).tobytes()) for number in range(count)])
    page.page.locator("#found tbody tr").first.wait_for()


def set_score(page, score: float) -> None:
    page.page.get_by_role("slider", name="Score from").fill(str(score))


def picture(page) -> np.ndarray:
    """The cloud's canvas as it is seen, (H, W, 3)."""
    shot = page.page.locator("#cloud").screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def test_boxes_of_an_opened_cloud_appear(page):
    open_frames(page)
    assert found(page) == FIRST_THREE
    assert "5,200 points" in page.page.locator("#frame-info").inner_text()
    eventually(lambda: count_colour(picture(page), (255, 159, 67)) > 300)
    assert count_colour(picture(page), (255, 92, 150)) > 50


def count_colour(seen: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((abs(seen - colour).max(2) < 12).sum())


def test_file_that_is_dropped_is_sent(page):
    cloud = make_cloud().tobytes()
    page.page.evaluate(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.bin"));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
        }""",
        list(cloud),
    )
    page.page.locator("#found tbody tr").first.wait_for()
    assert found(page) == FIRST_THREE


def test_slider_and_classes_filter_without_a_request(page, torchserve):
    open_frames(page)
    set_score(page, 0.1)
    assert found(page) == [*FIRST_THREE, ["Car", "0.12"]]
    set_score(page, 0.7)
    assert found(page) == [["Car", "0.91"]]
    set_score(page, 0)
    page.page.get_by_role("checkbox", name="Car").uncheck()
    assert found(page) == [["Pedestrian", "0.45"]]
    eventually(lambda: count_colour(picture(page), (255, 159, 67)) == 0)
    page.page.get_by_role("checkbox", name="Car").check()
    assert len(found(page)) == 4
    assert len(torchserve.calls) == 1


def test_bad_file_shows_what_the_server_says(page):
    page.drop(("broken.bin", b"bad!"))
    alert = page.page.get_by_role("alert")
    alert.get_by_text("422 undecodable_frame: bad frame").wait_for()
    assert page.page.locator("#frames [data-state=failed]").count() == 1
    assert page.page.get_by_role("button", name="Save JSON").is_disabled()
    open_frames(page)
    assert alert.inner_text() == ""


def test_one_bad_frame_leaves_the_others(page):
    page.drop(("a.bin", make_cloud().tobytes()), ("b.bin", b"bad!"), ("c.bin", make_cloud(1).tobytes()))
    page.page.locator("#frames [data-state=failed]").wait_for()
    page.page.locator("#frames [data-state=done]").nth(1).wait_for()
    page.page.get_by_role("button", name="b.bin").click()
    page.page.locator("#frame-info").get_by_text("undecodable_frame").wait_for()
    page.page.get_by_role("button", name="c.bin").click()
    eventually(lambda: found(page) == FIRST_THREE)


def test_server_that_drains_is_said_so(page, gateway):
    state = page.page.locator("#server-summary")
    state.get_by_text("ready · 1 model").wait_for()
    gateway.lifecycle.draining = True
    page.page.locator("#server summary").click()
    state.get_by_text("not ready: draining").wait_for()
    open_frames(page)  # what comes while it drains is answered
    gateway.lifecycle.draining = False
    page.page.locator("#server summary").click()
    state.get_by_text("ready · 1 model").wait_for()


def test_server_that_is_gone_is_said_so(page, gateway):
    gateway.listening.close()
    try:
        page.drop(("late.bin", make_cloud().tobytes()))
        page.page.get_by_role("alert").get_by_text("cannot be reached").wait_for()
        page.page.locator("#server summary").click()
        page.page.locator("#server-summary[data-state=down]").wait_for()
    finally:
        page.page.close()
        gateway.listening = type("Closed", (), {"close": lambda self: None})()


def test_sequence_is_played_to_its_end_and_boxes_move(page, torchserve):
    open_frames(page, 4)
    page.page.get_by_role("spinbutton", name="Frames/s").fill("20")
    page.page.get_by_role("button", name="Play").click()
    page.page.locator("#position-text").get_by_text("4 / 4").wait_for()
    last = BOXES[0][0][0] + 3 * STEP_M
    eventually(lambda: page.rows() and f"{last:.1f}, 3.0, -1.7 m" in page.rows()[0])
    page.page.get_by_role("button", name="Play").wait_for()  # no longer "Pause"
    page.page.get_by_role("button", name="Previous frame").click()
    page.page.locator("#position-text").get_by_text("3 / 4").wait_for()
    assert sum(map(len, torchserve.calls)) == 4  # each frame once


def test_followed_box_stays_in_its_place(page):
    page.page.get_by_role("checkbox", name="Names").uncheck()
    open_frames(page, 4)
    page.page.locator("#found tbody button").first.click()
    page.page.get_by_role("checkbox", name="Follow").check()
    eventually(lambda: count_colour(picture(page), (255, 159, 67)) > 500)
    before = centre_of_colour(page)
    for number in (1, 2, 3):
        page.page.get_by_role("button", name="Next frame").click()
        page.page.locator("#position-text").get_by_text(f"{number + 1} / 4").wait_for()
    eventually(lambda: "12.8, 3.0" in page.rows()[0])
    assert page.page.locator("#found tr[data-selected=true]").count() == 1
    followed = centre_of_colour(page)
    page.page.get_by_role("checkbox", name="Follow").uncheck()
    for _ in range(3):
        page.page.get_by_role("button", name="Previous frame").click()
    eventually(lambda: "12.0, 3.0" in page.rows()[0])
    left_alone = centre_of_colour(page)
    assert abs(followed - before).max() < 3 < abs(left_alone - followed).max()


def test_selected_box_is_found_again_after_frames_without_it(page, monkeypatch):
    def answer(frame, options):
        whole = json.loads(scene_answer(frame, options))
        is_second = np.frombuffer(frame[:4], "<f4")[0] == 20 + STEP_M
        if is_second:  # the selected car is missed here
            for name in ("bboxes_3d", "scores_3d", "labels_3d", "names"):
                del whole[name][0]
        return json.dumps(whole).encode()

    monkeypatch.setattr("tests.gateway.fake_torchserve.answer_for", answer)
    open_frames(page, 3)
    page.page.locator("#found tbody button").first.click()
    for number, is_there in ((2, False), (3, True)):
        page.page.get_by_role("button", name="Next frame").click()
        page.page.locator("#position-text").get_by_text(f"{number} / 3").wait_for()
        selected = page.page.locator("#found tr[data-selected=true]")
        eventually(lambda: bool(selected.count()) == is_there)  # noqa: B023
    assert "12.5, 3.0" in selected.inner_text()


def centre_of_colour(page) -> np.ndarray:
    seen = picture(page)
    return np.argwhere(abs(seen - (255, 159, 67)).max(2) < 12).mean(0)


def test_model_is_chosen_and_frames_are_sent_to_it(scene, torchserve, gateway, open_page):
    torchserve.models["other"] = {"2.0": FakeModel()}
    page = open_page(gateway.url)
    page.is_ready()
    choice = page.page.get_by_role("combobox", name="Model")
    eventually(lambda: choice.locator("option").count() == 2)
    assert choice.locator("option").all_inner_texts() == ["other 2.0", "second 1.0"]
    open_frames(page)
    choice.select_option("second 1.0")
    page.page.locator("#frames [data-state=done]").wait_for()
    eventually(lambda: len(torchserve.calls) == 2)
    count = page.page.locator("#server-models tr")
    eventually(lambda: count.count() == 2)


def test_options_go_with_the_request(page, torchserve, monkeypatch):
    seen = []

    def answer(frame, options):
        seen.append(options)
        return scene_answer(frame, options)

    monkeypatch.setattr("tests.gateway.fake_torchserve.answer_for", answer)
    page.page.get_by_text("Options of the requests").click()
    page.page.get_by_label("Most detections").fill("7")
    page.page.get_by_label("Columns of the cloud").fill("y,x,z,intensity")
    page.page.get_by_role("button", name="Send again").click()
    open_frames(page)
    assert seen[-1] | {"max_detections": 7, "columns": "y,x,z,intensity"} == seen[-1]
    assert "x -20.0 to 20.0" in page.page.locator("#frame-info").inner_text()
    page.page.get_by_label("Most detections").fill("-")
    page.page.get_by_label("Most detections").evaluate("field => field.removeAttribute('pattern')")
    page.page.get_by_role("button", name="Send again").click()
    page.page.get_by_role("alert").get_by_text("400 unknown_option").wait_for()


def test_sequence_of_a_track_session_has_ids_and_ends_its_session(page, gateway, torchserve):
    page.page.get_by_text("Options of the requests").click()
    page.page.get_by_label("Track session").fill("drive-7")
    page.page.get_by_role("button", name="Send again").click()
    open_frames(page, 4)
    eventually(lambda: page.page.locator("#frames [data-state=done]").count() == 4)
    for number in range(4):
        page.page.locator("#frames button").nth(number).click()
        eventually(
            lambda: (
                [row.split()[:2] for row in page.rows()]
                == [["Car", "#1"], ["Car", "#2"], ["Pedestrian", "#3"]]
            )
        )
    set_score(page, 0.1)
    assert found(page)[-1] == ["Car", "0.12"]  # its score starts no track: no id
    assert "track_sessions" not in gateway.client.get("/models").json()[0]  # it is ended
    page.page.get_by_role("button", name="Send again").click()  # anew: no session_not_found, ids from 1
    eventually(lambda: sum(map(len, torchserve.calls)) == 8)
    eventually(lambda: page.page.locator("#frames [data-state=done]").count() == 4)


def track_requests(page, names):
    """Drop frames of these names, and return the queries of their requests."""
    seen = []
    page.page.on("request", lambda sent: seen.append(sent.url) if "/predictions/" in sent.url else None)
    page.page.get_by_text("Options of the requests").click()
    page.page.get_by_label("Track session").fill("drive-7")
    page.page.get_by_role("button", name="Send again").click()
    page.drop(*((name, make_cloud(k).tobytes()) for k, name in enumerate(names)))
    eventually(lambda: page.page.locator("#frames [data-state=done]").count() == len(names))
    return [parse_qs(urlsplit(url).query) for url in seen]


def test_frames_of_a_track_session_have_the_times_in_their_names(page):
    names = [
        "n015-2018-07-24__LIDAR_TOP__1532402927647951.bin",
        "n015-2018-07-24__LIDAR_TOP__1532402928147847.bin",
    ]
    queries = track_requests(page, names)
    assert [query["frame_time_s"] for query in queries] == [["1532402927.647951"], ["1532402928.147847"]]


def test_names_without_times_send_none(page):
    assert all("frame_time_s" not in query for query in track_requests(page, ["1305031102.1.bin", "b.bin"]))


def test_first_frame_that_fails_leaves_its_track_session_to_the_next_one(page):
    page.page.get_by_text("Options of the requests").click()
    page.page.get_by_label("Track session").fill("drive-7")
    page.page.get_by_role("button", name="Send again").click()
    page.drop(("0.bin", b"bad!"), ("1.bin", make_cloud().tobytes()), ("2.bin", make_cloud(1).tobytes()))
    eventually(lambda: page.page.locator("#frames [data-state=done]").count() == 2)


def test_answer_is_saved_as_the_server_sent_it(page, gateway):
    cloud = make_cloud().tobytes()
    page.drop(("000008.bin", cloud))
    page.page.locator("#found tbody tr").first.wait_for()
    with page.page.expect_download() as download:
        page.page.get_by_role("button", name="Save JSON").click()
    assert download.value.suggested_filename == "000008.bin.json"
    saved = json.loads(download.value.path().read_text())
    assert saved == gateway.post(content=cloud).json()


def test_answers_of_several_frames_are_saved_with_their_names(page):
    page.drop(("a.bin", make_cloud().tobytes()), ("b.bin", b"bad!"))
    page.page.locator("#frames [data-state=failed]").wait_for()
    page.page.locator("#frames [data-state=done]").wait_for()
    with page.page.expect_download() as download:
        page.page.get_by_role("button", name="Save JSON").click()
    saved = json.loads(download.value.path().read_text())
    assert [frame["name"] for frame in saved["frames"]] == ["a.bin", "b.bin"]
    assert len(saved["frames"][0]["answer"]["scores_3d"]) == len(BOXES)
    assert "undecodable_frame" in saved["frames"][1]["error"]


def test_picture_is_saved_with_boxes_and_names(page):
    open_frames(page)
    with page.page.expect_download() as download:
        page.page.get_by_role("button", name="Save PNG").click()
    saved = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    assert saved.shape[0] > 400 and saved.shape[1] > 600
    assert count_colour(saved, (255, 159, 67)) > 300


@pytest.mark.parametrize("what", ["intensity", "class"])
def test_colours_of_points_change(page, what):
    open_frames(page)
    page.page.get_by_role("checkbox", name="Names").uncheck()
    set_score(page, 1)  # no boxes: only points are compared
    by_height = picture(page)
    page.page.get_by_role("combobox", name="Colour by").select_option(what)
    set_score(page, 0.3 if what == "class" else 1)
    eventually(lambda: (abs(picture(page) - by_height).max(2) > 20).sum() > 1000)


def test_frame_is_sent_again_after_429(scene, start_gateway, open_page):
    # One place is taken by a request from elsewhere; the page's frame gets in when that has gone.
    gateway = start_gateway(max_pending_frames=1, max_frames_per_request=1)
    page = open_page(gateway.url)
    page.is_ready()
    permit = gateway.admission.permit("elsewhere")
    permit.grow(items=1)
    page.drop(("frame.bin", make_cloud().tobytes()))
    eventually(lambda: 'status="429"' in gateway.client.get("/metrics").text)
    permit.release()
    page.page.locator("#frames [data-state=done]").wait_for()


@pytest.mark.parametrize("status", [429, 503])
def test_frame_is_sent_again_after_the_time_that_the_server_asks_for(page, status):
    times = []

    def answer(route):
        times.append(time.monotonic())
        if len(times) == 1:
            route.fulfill(
                status=status, headers={"Retry-After": "1"}, body='{"error": {"code": "x", "message": "y"}}'
            )
        else:
            route.continue_()

    page.page.route("**/predictions/**", answer)
    page.drop(("frame.bin", make_cloud().tobytes()))
    page.page.locator("#frames [data-state=done]").wait_for()
    assert len(times) == 2 and 1.0 <= times[1] - times[0] < 5


def test_demonstration_frame_is_one_click_away(page):
    page.page.get_by_role("button", name="Try the demonstration's frame").click()
    page.page.locator("#found tbody tr").first.wait_for()
    assert "sample.bin" in page.page.locator("#frame-info").inner_text()


def test_page_without_webgl_lists_detections(scene, gateway, open_page):
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    page = open_page("about:blank")
    page.page.add_init_script(
        "const real = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {"
        "  return kind.startsWith('webgl') ? null : real.call(this, kind, ...rest); };"
    )
    page.open(gateway.url)
    page.page.get_by_role("alert").get_by_text("no WebGL").wait_for()
    page.is_ready()
    open_frames(page)
    assert found(page) == FIRST_THREE
    page.page.get_by_role("button", name="Save PNG").click()
    page.page.get_by_role("alert").get_by_text("no view of this frame is shown").wait_for()
    page.errors[:] = [error for error in page.errors if "WebGL" not in error]
