"""Child process below the guard, which ends it even if this process is killed.

The command gets a process group of its own, which its children join. The guard (`serve.torchserve.guard`) prints
the command's process id and exit code on a pipe, which is read here.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

__all__ = ["GuardedProcess"]

_GUARD = Path(__file__).with_name("guard.py")
_POLL_S = 0.05
_LONGEST_READ_S = 0.5
_GUARD_END_S = 10.0  # beside the time to drain


class GuardedProcess:
    """One command, started at once, in a process group of its own.

    Attributes:
        pid: process id of the command; None until the guard has started it.
        guard_pid: process id of the guard.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        environment: Mapping[str, str],
        drain_s: float,
        output: Path | None = None,
        stderr: IO[bytes] | None = None,
    ) -> None:
        """Start the guard, which starts the command.

        Args:
            command: program and arguments.
            folder: working folder of the command; the guard removes it at the end.
            environment: environment variables of both.
            drain_s: seconds from SIGTERM to SIGKILL if the guard is ended by a signal.
            output: file for what the command prints; None for `stderr`.
            stderr: file for the guard's standard error; None for that of this process.
        """
        log = "-" if output is None else str(output)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), str(folder), str(drain_s), log, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )
        self.guard_pid = self._guard.pid
        self.pid: int | None = None
        self._exit_code: int | None = None
        self._unread = b""
        self._is_stopped = False
        assert self._guard.stdout is not None
        os.set_blocking(self._guard.stdout.fileno(), False)

    def await_pid(self, timeout_s: float) -> int | None:
        """Wait until the command runs; return its process id, or None if it did not start."""
        deadline = time.monotonic() + timeout_s
        while self.pid is None and time.monotonic() < deadline and self.poll() is None:
            self._read(_POLL_S)
        return self.pid

    def poll(self) -> int | None:
        """Return None while the command runs, else its exit code (negative: the signal)."""
        if self._exit_code is None and not self._is_stopped:
            self._read(0)
            if self._exit_code is None and self._guard.poll() is not None:
                # Stopped by a signal to the guard, or killed together with it.
                self._exit_code = 0 if self._guard.returncode == 0 else -signal.SIGKILL
        return self._exit_code

    def wait(self, timeout_s: float) -> int | None:
        """Wait up to `timeout_s` seconds for the command to exit; return as `poll` does."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and (left := deadline - time.monotonic()) > 0:
            self._read(min(left, _LONGEST_READ_S))
        return self._exit_code

    def stop(self, drain_s: float) -> None:
        """End the command and its children; does nothing when stopped.

        Args:
            drain_s: seconds from SIGTERM to SIGKILL; 0 kills at once.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        guard = self._guard
        assert guard.stdin is not None and guard.stdout is not None
        with contextlib.suppress(OSError):
            guard.stdin.write(f"stop {drain_s}\n".encode())
            guard.stdin.flush()
        try:
            guard.wait(drain_s + _GUARD_END_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        finally:
            with contextlib.suppress(OSError):
                guard.stdin.close()
            guard.stdout.close()
            if self.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
        if self._exit_code is None:
            self._exit_code = -signal.SIGTERM

    def _read(self, timeout_s: float) -> None:
        """Read the guard's output, waiting for it up to `timeout_s` seconds."""
        if self._is_stopped:  # by another thread
            return
        assert self._guard.stdout is not None
        pipe = self._guard.stdout.fileno()
        if not select.select([pipe], [], [], timeout_s)[0]:
            return
        piece = os.read(pipe, 4096)
        if not piece:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(min(timeout_s, _LONGEST_READ_S))
            return
        *lines, self._unread = (self._unread + piece).split(b"\n")
        for line in lines:
            word, number = line.split()
            if word == b"pid":
                self.pid = int(number)
            elif word == b"exit":
                self._exit_code = int(number)
