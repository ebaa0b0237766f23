"""Thins out what a worker prints for every batch.

TorchServe reads a worker's standard output, line by line with a pattern, while the worker's answer and the next
batch wait for the same cores: two lines per batch cost about a millisecond of the two or three that lie between two
batches. One line repeats what the log has anyway; the other is a gauge, of which only the last value is
ever seen. Knows the words of TorchServe 0.12.0.
"""

from __future__ import annotations

import logging
import time

__all__ = ["install_log_filters"]

GAUGE_EVERY_S = 1.0
_METRICS_LOGGER = "ts.metrics.caching_metric"


class _NotPerRequest(logging.Filter):
    """Leaves out that a request came."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Backend received inference")


class _GaugesSeldom(logging.Filter):
    """Lets a value of each gauge pass once in `GAUGE_EVERY_S`; counters and histograms, which add up, always."""

    def __init__(self) -> None:
        super().__init__()
        self._passed_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if not text.startswith("[METRICS]") or "#type:GAUGE" not in text:
            return True
        name, now = text.partition(":")[0], time.monotonic()
        if now - self._passed_at.get(name, float("-inf")) < GAUGE_EVERY_S:
            return False
        self._passed_at[name] = now
        return True


def install_log_filters() -> None:
    """Do so in this process from now on; harmless the second time."""
    for name, made in (("root", _NotPerRequest), (_METRICS_LOGGER, _GaugesSeldom)):
        said_by = logging.getLogger(None if name == "root" else name)
        if not any(isinstance(one, made) for one in said_by.filters):
            said_by.addFilter(made())
