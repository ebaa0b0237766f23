"""Filters of the lines that a worker prints for every batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from serve.worker import log_filters

METRICS = logging.getLogger("ts.metrics.caching_metric")


@pytest.fixture(autouse=True)
def filters_are_put_back() -> Iterator[None]:
    before = {one: one.filters[:] for one in (logging.getLogger(), METRICS)}
    yield
    for one, filters in before.items():
        one.filters[:] = filters


def metric(name: str, value: float, kind: str = "GAUGE") -> str:
    return f"[METRICS]{name}.ms:{value}|#ModelName:second,Level:Model|#type:{kind}|#hostname:h,1795266686"


def test_gauge_is_printed_once_per_second_and_at_first(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 50.0
    monkeypatch.setattr(log_filters.time, "monotonic", lambda: now)
    log_filters.install_log_filters()
    with caplog.at_level(logging.INFO):
        for _ in range(25):
            METRICS.info(metric("PredictionTime", now))
            METRICS.info(metric("HandlerTime", now))
            now += 0.1
    printed = [text for text in caplog.messages if "PredictionTime" in text]
    assert len(printed) == 3 and printed[0] == metric("PredictionTime", 50.0)
    assert len(caplog.messages) == 6


def test_every_counter_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    log_filters.install_log_filters()
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            METRICS.info(metric("Frames", 1, "COUNTER"))
    assert len(caplog.messages) == 5


def test_only_the_received_line_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    log_filters.install_log_filters()
    log_filters.install_log_filters()
    with caplog.at_level(logging.INFO):
        logging.info("Backend received inference at: %d", 1)
        logging.info("Frontend disconnected.")
        logging.getLogger("ts.service").info("Backend received inference of a named logger")
    assert caplog.messages == ["Frontend disconnected.", "Backend received inference of a named logger"]
    assert len(logging.getLogger().filters) == 1
