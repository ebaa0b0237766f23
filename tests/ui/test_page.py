"""The page in a browser: what its user sees and does."""

from __future__ import annotations

from tests.ui.conftest import make_cloud


def test_boxes_of_a_dropped_cloud_appear(page):
    page.drop(("frame.bin", make_cloud().tobytes()))
    page.page.locator("#found tbody tr").first.wait_for()
    assert [row.split()[:2] for row in page.rows()] == [
        ["Car", "0.91"],
        ["Car", "0.62"],
        ["Pedestrian", "0.45"],
    ]
    assert "5,200 points" in page.page.locator("#frame-info").inner_text()
