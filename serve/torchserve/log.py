"""Reads TorchServe's log while it grows and finds out why a worker did not load its model.

TorchServe answers ``/ping`` with "Healthy" and retries for minutes while a model cannot be loaded; the
reason is only in the log, in what the worker printed. Knows the line format that `config.log_configuration`
sets and the words of TorchServe 0.12.0; starts and stops nothing.
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
_WORDLESS = "its worker ended without saying why (killed? out of memory?)"
# What a worker printed can arrive a little after TorchServe has noticed its death.
_GRACE_S = 1.0
# Or never: TorchServe stops reading when it notices. It starts the worker again within seconds, which says it again.
_DEATHS_WITHOUT_A_WORD = 2


@dataclass(frozen=True)
class LoadFailure:
    """A worker that died while loading.

    Attributes:
        model: name of the model.
        reason: one sentence: the exception that ended the load.
        lines: the last lines that the worker printed.
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
    """The log file of one TorchServe, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._histories: dict[str, _WorkerHistory] = {}
        self._trouble: str | None = None

    def failure(self, models: Collection[str]) -> LoadFailure | None:
        """The first worker of `models` that died, once all it printed is there; None while all is well.

        One that died and left no reason behind gets another try first.
        """
        self._read()
        for history in self._histories.values():
            if history.model not in models or not history.deaths:
                continue
            waited = time.monotonic() - history.died_at > _GRACE_S
            reason = _reason(history.printed)
            if reason is not None and (waited or history.all_read):
                return LoadFailure(history.model, reason, tuple(history.printed))
            if reason is None and waited and history.deaths >= _DEATHS_WITHOUT_A_WORD:
                return LoadFailure(history.model, _WORDLESS, tuple(history.printed))
        return None

    def discard(self) -> None:
        """Forget all that was read so far: what happened before is not about what is loaded now."""
        self._read()
        self._histories.clear()

    def last_problem(self) -> str | None:
        """The last message of level ERROR or WARN, if there was one."""
        self._read()
        return self._trouble

    def _read(self) -> None:
        if not self.path.exists():
            return
        if self.path.stat().st_size < self._offset:
            self._offset = 0  # The file was rolled over.
        with self.path.open("rb") as file:
            file.seek(self._offset)
            piece = file.read()
        self._offset += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace"))

    def _take(self, line: str) -> None:
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


def _reason(printed: deque[str]) -> str | None:
    """The last exception of the worker's tracebacks, but for TorchServe's own that repeats it as a code; None: none."""
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
