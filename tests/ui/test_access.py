"""Who may use the page and how: keys, keyboard, screen readers, no other host; the API documentation."""

from __future__ import annotations

import pytest

from tests.gateway.running import eventually
from tests.ui.conftest import make_cloud
from tests.ui.test_page import found, open_frames, picture

KEY = "correct horse battery"


@pytest.fixture
def locked(scene, start_gateway):
    gateway = start_gateway(api_keys=(KEY,))
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    return gateway


def test_page_asks_for_the_key_and_forgets_it(locked, open_page):
    page = open_page(locked.url)
    field = page.page.get_by_label("API key")
    field.wait_for()
    field.fill("wrong")
    field.press("Enter")
    page.page.locator("#server-summary").get_by_text("API key needed").wait_for()
    field.fill(KEY)
    page.page.get_by_role("button", name="Use key").click()
    page.is_ready()
    open_frames(page)
    assert len(found(page)) == 3
    kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
    assert KEY not in page.page.evaluate(kept) and KEY not in page.page.content()
    page.page.reload()
    page.page.get_by_label("API key").wait_for()


def test_api_documentation_is_drawn_and_asks_for_the_key(locked, open_page):
    page = open_page(f"{locked.url}/docs")
    page.page.get_by_label("API key").fill(KEY)
    page.page.keyboard.press("Enter")
    page.page.get_by_text("/predictions/{model}", exact=True).first.wait_for()
    page.page.get_by_role("button", name="GET /models Models").click()
    page.page.get_by_role("button", name="Try it out").click()
    page.page.get_by_role("button", name="Execute").click()
    page.page.locator(".response .response-col_status").get_by_text("200").wait_for()


def test_frame_is_opened_and_turned_by_keyboard(page):
    open_frames(page)
    before = picture(page)
    page.page.locator("#cloud").focus()
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowRight", "+", "+"):
        page.page.keyboard.press(key)
        eventually(lambda before=before: (abs(picture(page) - before).max(2) > 20).sum() > 200)
        before = picture(page)
    page.page.locator("#found tbody button").first.focus()
    page.page.keyboard.press("Enter")
    page.page.locator("#found tr[data-selected=true]").wait_for()


def test_every_control_has_a_name_and_can_be_reached_by_tab(page):
    open_frames(page, 2)
    controls = page.page.locator("button, input, select, summary, a, canvas[tabindex]").filter(visible=True)
    ids = set()
    for _ in range(60):
        page.page.keyboard.press("Tab")
        ids.add(page.page.evaluate("document.activeElement.outerHTML"))
    for control in controls.all():
        if control.is_enabled():
            assert control.evaluate("node => node.outerHTML") in ids, control.evaluate(
                "node => node.outerHTML"
            )
    tree = page.page.locator("body").aria_snapshot()
    for line in (
        'combobox "Model',
        'slider "Score from',
        'slider "Position in the sequence"',
        'table "Detections shown',
    ):
        assert line in tree, tree
    assert "- button\n" not in tree and "- checkbox\n" not in tree and "- textbox\n" not in tree


def test_what_happens_is_announced(page):
    status = page.page.get_by_role("status")
    open_frames(page)
    status.get_by_text("000000.bin: 4 detections").wait_for()
    label = page.page.locator("#cloud").get_attribute("aria-label")
    assert "5200 points" in label and "3 detections shown" in label
    page.page.get_by_role("slider", name="Score from").fill("0.9")
    eventually(lambda: "1 detection shown" in page.page.locator("#cloud").get_attribute("aria-label"))


def test_million_points_are_drawn_in_part_while_turned_and_whole_at_rest(page):
    page.page.get_by_role("slider", name="Score from").fill("1")
    page.drop(("million.bin", make_cloud(points=1_000_000).tobytes()))
    page.page.locator("#frame-info").get_by_text("1,001,200 points").wait_for(timeout=60_000)
    cloud = page.page.locator("#cloud")
    # As fast as pictures come for five seconds; SwiftShader cannot draw a million points 30 times per second.
    drawn = cloud.evaluate(
        """async canvas => {
            const drawn = [];
            for (const end = performance.now() + 5000; performance.now() < end; ) {
                canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
                await new Promise(requestAnimationFrame);
                drawn.push(Number(canvas.dataset.drawn));
            }
            return drawn;
        }"""
    )
    assert 0 < min(drawn) < 200_000
    eventually(lambda: cloud.get_attribute("data-drawn") == "1001200")
