"""Counts and durations of a model's batches, as Triton's statistics extension has them.

Source: triton-inference-server/server, ``docs/protocol/extension_statistics.md``. A duration of a batch counts once for
each of its frames, and once for the batch under ``batch_stats``. They are those of this process, since the model was
first seen.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.gateway.batcher import BatchReport

__all__ = ["ModelStatistics"]


@dataclass
class _Duration:
    count: int = 0
    ns: int = 0

    def add(self, count: int, seconds: float) -> None:
        self.count += count
        self.ns += round(seconds * 1e9) * count

    def document(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass
class _BatchSize:
    """Durations of the batches of one size: in the worker, and on the way there and back."""

    decode: _Duration = field(default_factory=_Duration)
    inference: _Duration = field(default_factory=_Duration)
    transfer: _Duration = field(default_factory=_Duration)


@dataclass
class ModelStatistics:
    """Statistics of one version of a model."""

    _last_ms: int = 0
    _executions: int = 0
    _success: _Duration = field(default_factory=_Duration)
    _fail: _Duration = field(default_factory=_Duration)
    _queue: _Duration = field(default_factory=_Duration)
    _frames: _BatchSize = field(default_factory=_BatchSize)
    _sizes: dict[int, _BatchSize] = field(default_factory=lambda: defaultdict(_BatchSize))

    def observe(self, report: BatchReport) -> None:
        """Count a batch that ran."""
        self._last_ms = time.time_ns() // 1_000_000
        seconds: Mapping[str, float] | None = None
        answered = 0
        for i, waited_s in enumerate(report.queue_s):
            outcome = report.outcomes[i] if i < len(report.outcomes) else None
            if outcome is None or isinstance(outcome, Exception):
                self._fail.add(1, waited_s + report.run_s)
                continue
            seconds, answered = outcome.seconds, answered + 1
            self._success.add(1, waited_s + report.run_s)
            self._queue.add(1, waited_s)
        if seconds is None:  # no frame of it was computed: Triton counts executions that succeeded
            return
        self._executions += 1
        decode_s, inference_s = seconds.get("decode", 0.0), seconds.get("inference", 0.0)
        transfer_s = max(0.0, report.run_s - decode_s - inference_s)
        for sums, count in ((self._frames, answered), (self._sizes[report.items], 1)):
            sums.decode.add(count, decode_s)
            sums.inference.add(count, inference_s)
            sums.transfer.add(count, transfer_s)

    def document(self, name: str, version: str) -> dict[str, Any]:
        """Return the entry of this model in ``model_stats``."""
        none = _Duration().document()
        return {
            "name": name,
            "version": version,
            "last_inference": self._last_ms,
            "inference_count": self._success.count,
            "execution_count": self._executions,
            "inference_stats": {
                "success": self._success.document(),
                "fail": self._fail.document(),
                "queue": self._queue.document(),
                **_stages(self._frames),
                "cache_hit": none,
                "cache_miss": none,
            },
            "batch_stats": [
                {"batch_size": size, **_stages(self._sizes[size])} for size in sorted(self._sizes)
            ],
        }


def _stages(sums: _BatchSize) -> dict[str, dict[str, int]]:
    return {
        "compute_input": sums.decode.document(),
        "compute_infer": sums.inference.document(),
        "compute_output": sums.transfer.document(),
    }
