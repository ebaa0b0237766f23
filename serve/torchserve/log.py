"""Follow TorchServe's log and find the reason why a worker did not load its model.

TorchServe answers ``/ping`` with "Healthy" and retries for minutes while a model cannot be loaded; only the worker's
output in the log contains the reason. The parser expects the line format of `config.log_configuration` and the messages
of TorchServe 0.12.0.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["LoadFailure", "WorkerLog"]

_LINE = re.compile(r"\S+ ([A-Z]+) \[([^\]]*)\] (\S+): (.*)")
_THREAD = re.compile(r"(W-\d+-(.+)_[0-9.]+)(-stdout|-stderr)?")
_RAISED = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)(?:: (.*))?")
_SECOND_HAND = re.compile(r"\d{3} - ")
_KEPT_LINES = 60
_NO_REASON = "its worker ended without an error message (killed? out of memory?)"
# A worker's output can arrive shortly after TorchServe has noticed its death.
_GRACE_S = 1.0
# It can also be lost: TorchServe stops reading then. The worker is restarted within seconds and prints it again.
_MAX_SILENT_DEATHS = 2


@dataclass(frozen=True)
class LoadFailure:
    """A worker that died while loading.

    Attributes:
        model: name of the model.
        reason: the exception that ended the load, in one line.
        lines: last lines of the worker's output.
    """

    model: str
    reason: str
    lines: tuple[str, ...]


@dataclass
class _WorkerHistory:
    model: str
    printed: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    deaths: int = 0
    died_at: float = 0.0
    all_read: bool = False


class WorkerLog:
    """Log file of one TorchServe, read while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._histories: dict[str, _WorkerHistory] = {}
        self._trouble: str | None = None

    def failure(self, models: Collection[str]) -> LoadFailure | None:
        """Find the first worker of `models` that died, once its output is complete; None without any.

        A worker that died without a message gets another start first.
        """
        self._read()
        for history in self._histories.values():
            if history.model not in models or not history.deaths:
                continue
            waited = time.monotonic() - history.died_at > _GRACE_S
            reason = _find_reason(history.printed)
            if reason is not None and (waited or history.all_read):
                return LoadFailure(history.model, reason, tuple(history.printed))
            if reason is None and waited and history.deaths >= _MAX_SILENT_DEATHS:
                return LoadFailure(history.model, _NO_REASON, tuple(history.printed))
        return None

    def discard(self) -> None:
        """Discard everything read so far, before another model is loaded."""
        self._read()
        self._histories.clear()

    def last_problem(self) -> str | None:
        """Read the last message of level ERROR or WARN, or None."""
        self._read()
        return self._trouble

    def _read(self) -> None:
        if not self.path.exists():
            return
        if self.path.stat().st_size < self._offset:
            self._offset = 0  # the file was rotated
        with self.path.open("rb") as file:
            file.seek(self._offset)
            piece = file.read()
        self._offset += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._parse_line(line.decode(errors="replace"))

    def _parse_line(self, line: str) -> None:
        parsed = _LINE.fullmatch(line)
        if parsed is None:
            return
        level, thread, logger, message = parsed.groups()
        if level in ("ERROR", "WARN"):
            self._trouble = message
        worker = _THREAD.fullmatch(thread)
        if worker is None:
            return
        name, model, stream = worker.groups()
        history = self._histories.setdefault(name, _WorkerHistory(model))
        if logger == "MODEL_LOG":
            history.printed.append(message)
        elif stream is None and message.startswith("Retry worker"):
            history.deaths += 1
            history.died_at = time.monotonic()
        elif stream == "-stdout" and message.startswith("Stopped Scanner"):
            history.all_read = True


def _find_reason(printed: deque[str]) -> str | None:
    """Find the last exception of the worker's tracebacks, except TorchServe's own, which repeats it as a code."""
    raised: list[str] = []
    inside = False
    for line in printed:
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and line and not line[0].isspace():
            inside = False
            if found := _RAISED.fullmatch(line):
                kind, text = found.groups()
                if text and _SECOND_HAND.match(text):
                    continue
                raised.append(text if kind.startswith("serve.errors.") and text else line)
    return raised[-1] if raised else None
