"""Log filters that drop most of the lines which a worker prints for every batch.

TorchServe matches every line of a worker's standard output against a pattern, while the worker's answer and the next
batch compete for the same cores: two lines per batch cost about one of the two or three milliseconds between batches.
One of them repeats what the log has anyway; the other is a gauge, of which only the latest value matters. The texts
are those of TorchServe 0.12.0.
"""

from __future__ import annotations

import logging
import time

__all__ = ["install_log_filters"]

GAUGE_INTERVAL_S = 1.0
_METRICS_LOGGER = "ts.metrics.caching_metric"


class _DropInferenceReceived(logging.Filter):
    """Drops the line that an inference request was received."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Backend received inference")


class _ThrottleGauges(logging.Filter):
    """Passes each gauge once per `GAUGE_INTERVAL_S`; counters and histograms, which accumulate, always."""

    def __init__(self) -> None:
        super().__init__()
        self._passed_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if not text.startswith("[METRICS]") or "#type:GAUGE" not in text:
            return True
        name, now = text.partition(":")[0], time.monotonic()
        if now - self._passed_at.get(name, float("-inf")) < GAUGE_INTERVAL_S:
            return False
        self._passed_at[name] = now
        return True


def install_log_filters() -> None:
    """Install the filters in this process; a second call has no effect."""
    for name, filter_class in ((None, _DropInferenceReceived), (_METRICS_LOGGER, _ThrottleGauges)):
        target = logging.getLogger(name)
        if not any(isinstance(installed, filter_class) for installed in target.filters):
            target.addFilter(filter_class())
