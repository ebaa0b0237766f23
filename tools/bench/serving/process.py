"""Server under test as a process group that can be paused, timed and ended.

It runs under the same guard as TorchServe, which ends it even if this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from serve.errors import BackendStartError
from serve.torchserve.guarded_process import GuardedProcess
from serve.torchserve.java import child_environment

__all__ = ["ManagedProcess", "cpu_seconds", "pause", "resume"]

_START_S = 10.0


class ManagedProcess:
    """Command under the guard; a context manager."""

    def __init__(self, name: str, command: Sequence[str], drain_s: float = 3.0) -> None:
        """Set the command, its `name` in messages, and the `drain_s` seconds it gets to exit."""
        self._name = name
        self._command = command
        self._drain_s = drain_s
        self._folder = Path(tempfile.mkdtemp(prefix="mmdet3d-serve-bench-"))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.pid = 0
        self._process: GuardedProcess | None = None

    def __enter__(self) -> Self:
        self._process = GuardedProcess(
            self._command,
            self._folder,
            environment=child_environment(),
            drain_s=self._drain_s,
            stderr=self._log,
        )
        pid = self._process.await_pid(_START_S)
        if pid is None:
            self._end()
            raise BackendStartError(f"{self._name} could not be started: {self.log_tail()}")
        self.pid = pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._log.close()

    def has_ended(self) -> bool:
        """Return whether the command has exited by itself."""
        return self._process is not None and self._process.poll() is not None

    def log(self) -> str:
        """Read the output of the command, standard output and standard error."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def log_tail(self) -> str:
        """Return the last line of the output."""
        lines = [line.strip() for line in self.log().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "(no output)"

    def wait_for(self, text: str, timeout_s: float) -> str:
        """Wait for the first line that contains `text`; return the rest of that line.

        Raises:
            BackendStartError: the command exited, or printed no such line in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = [line.partition(text)[2] for line in self.log().splitlines(True) if text in line]
            if found and found[0].endswith("\n"):
                return found[0].strip()
            if self.has_ended():
                raise BackendStartError(f"{self._name} exited during start: {self.log_tail()}")
            time.sleep(0.05)
        raise BackendStartError(f"{self._name} not ready after {timeout_s:.0f} s: {self.log_tail()}")

    def _end(self) -> None:
        if self.pid:
            resume(self.pid)
        if self._process is not None:
            self._process.stop(self._drain_s)


def pause(group: int) -> None:
    """Suspend a process group, so that a server that spins when idle takes no CPU from the others."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGSTOP)


def resume(group: int) -> None:
    """Resume a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGCONT)


def cpu_seconds(roots: Sequence[int]) -> float:
    """Sum the CPU seconds of processes and all their descendants."""
    total = 0.0
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(root)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    total += times.user + times.system
    return total
