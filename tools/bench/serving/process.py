"""A server under test as a process group that can be paused, timed and ended, and that ends when we do.

It runs under the guard that TorchServe runs under, so nothing is left when this process is killed. Knows
nothing about what is served.
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

__all__ = ["Guarded", "cpu_seconds", "pause", "resume"]

_PATIENCE_S = 10.0


class Guarded:
    """A command under the guard; a context manager."""

    def __init__(self, name: str, command: Sequence[str], drain_s: float = 3.0) -> None:
        """`name` is for messages; the command gets `drain_s` seconds to end when it is asked to."""
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
        ready = select.select([self._guard.stdout], [], [], _PATIENCE_S)[0]
        said = self._guard.stdout.readline().split() if ready else []
        if len(said) != 2 or said[0] != b"pid":
            self._end()
            raise BackendStartError(f"{self._name} could not be started: {self.last_words()}")
        self.pid = int(said[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._log.close()

    def ended(self) -> bool:
        """Whether it has gone by itself."""
        assert self._guard.stdout is not None
        return self._guard.poll() is not None or bool(select.select([self._guard.stdout], [], [], 0)[0])

    def said(self) -> str:
        """All it wrote to standard output and standard error."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def last_words(self) -> str:
        """The last line it wrote."""
        lines = [line.strip() for line in self.said().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def wait_for(self, sign: str, patience_s: float) -> str:
        """The rest of the first line that holds `sign`.

        Raises:
            BackendStartError: it ended, or said no such thing in time.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            found = [line.partition(sign)[2] for line in self.said().splitlines(True) if sign in line]
            if found and found[0].endswith("\n"):
                return found[0].strip()
            if self.ended():
                raise BackendStartError(f"{self._name} ended while starting: {self.last_words()}")
            time.sleep(0.05)
        raise BackendStartError(f"{self._name} was not ready after {patience_s:.0f} s: {self.last_words()}")

    def _end(self) -> None:
        if self.pid:
            resume(self.pid)
        assert self._guard.stdin is not None and self._guard.stdout is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.write(f"stop {self._drain_s}\n".encode())
            self._guard.stdin.flush()
        try:
            self._guard.wait(self._drain_s + _PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        finally:
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
            self._guard.stdout.close()


def pause(group: int) -> None:
    """Stop a process group where it stands: a server that spins when idle takes nothing from the others."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGSTOP)


def resume(group: int) -> None:
    """Let it go on."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGCONT)


def cpu_seconds(roots: Sequence[int]) -> float:
    """CPU time so far of these processes and all below them, seconds."""
    total = 0.0
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(root)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    total += times.user + times.system
    return total
