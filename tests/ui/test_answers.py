"""The page with answers, and in windows, that are out of the ordinary."""

from __future__ import annotations

import json

from tests.gateway.running import eventually
from tests.ui.conftest import scene_answer
from tests.ui.test_page import count_colour, open_frames, picture


def test_numbers_that_are_none_are_listed_and_not_drawn(page, monkeypatch):
    answer = json.loads(scene_answer(b"", {}))
    answer["scores_3d"][0] = answer["bboxes_3d"][1][2] = None  # JSON has no NaN
    monkeypatch.setattr(
        "tests.gateway.fake_torchserve.answer_for", lambda frame, options: json.dumps(answer).encode()
    )
    open_frames(page)
    assert [row.split()[1:3] for row in page.rows()[:2]] == [["–", "12.0,"], ["0.62", "–"]]
    eventually(lambda: count_colour(picture(page), (255, 159, 67)) > 300)


def test_detections_beyond_the_rows_of_the_table_are_counted(page, monkeypatch):
    many = 450
    answer = {
        "bboxes_3d": [[5 + k % 30, k / 30, -1.7, 4, 2, 1.5, 0] for k in range(many)],
        "scores_3d": [0.9] * many,
        "labels_3d": list(range(many)),
        "names": [f"class {k}, “quoted” & <b>" for k in range(many)],
        "box_type_3d": "LiDAR",
        "classes": [f"class {k}, “quoted” & <b>" for k in range(many)],
    }
    monkeypatch.setattr(
        "tests.gateway.fake_torchserve.answer_for", lambda frame, options: json.dumps(answer).encode()
    )
    open_frames(page)
    assert len(page.rows()) == 201 and page.rows()[-1].startswith("250 more")
    assert page.page.locator("#classes input").count() == many
    page.page.get_by_role("checkbox", name="class 449, “quoted” & <b> (1)", exact=True).uncheck()
    assert page.page.locator("#found-title").inner_text().lower() == "detections: 449 of 450"
    assert page.page.get_by_role("button", name="Save JSON").bounding_box()["y"] < 800  # in reach


def test_page_fits_a_telephone(scene, gateway, open_page):
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    page = open_page(gateway.url, viewport={"width": 390, "height": 844})
    page.is_ready()
    open_frames(page, 3)
    width, whole, high = page.page.evaluate(
        "() => [innerWidth, document.documentElement.scrollWidth, document.querySelector('#frames').clientHeight]"
    )
    assert whole <= width and high > 80
    page.page.get_by_role("button", name="Save JSON").scroll_into_view_if_needed()
    for name in ("Files…", "Save JSON"):
        page.page.get_by_role("button", name=name).click(trial=True)
    page.page.locator("#server summary").click()
    box = page.page.locator("#server table").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
