"""Server under test as a process group that can be paused, timed and ended.

It runs under the same guard as TorchServe, which ends it even if this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from serve.errors import BackendStartError
from serve.torchserve import guard
from serve.torchserve.java import child_environment

__all__ = ["ManagedProcess", "cpu_seconds", "pause", "resume"]

_TIMEOUT_S = 10.0


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

    def __enter__(self) -> Self:
        self._guard = subprocess.Popen(
            [
                sys.executable,
                *("-I", "-S", guard.__file__, str(self._folder), str(self._drain_s), "-", "--"),
                *self._command,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=child_environment(),
            start_new_session=True,
        )
        assert self._guard.stdout is not None
        ready = select.select([self._guard.stdout], [], [], _TIMEOUT_S)[0]
        reply = self._guard.stdout.readline().split() if ready else []
        if len(reply) != 2 or reply[0] != b"pid":
            self._end()
            raise BackendStartError(f"{self._name} could not be started: {self.log_tail()}")
        self.pid = int(reply[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._log.close()

    def has_ended(self) -> bool:
        """Return whether the command has exited by itself."""
        assert self._guard.stdout is not None
        return self._guard.poll() is not None or bool(select.select([self._guard.stdout], [], [], 0)[0])

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
        assert self._guard.stdin is not None and self._guard.stdout is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.write(f"stop {self._drain_s}\n".encode())
            self._guard.stdin.flush()
        try:
            self._guard.wait(self._drain_s + _TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        finally:
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
            self._guard.stdout.close()


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
