"""The process between us and Java: it ends TorchServe when asked to, or when whoever started it is gone.

`process` runs this file as a script: ``python -I -S guard.py RUN_DIR DRAIN_S LOG -- JAVA ARGUMENTS…``. It
starts Java in a process group of its own (TorchServe's Python workers join it) and then waits:

* ``stop SECONDS`` on standard input: SIGTERM to Java, SIGKILL to the group after SECONDS; SIGTERM:
  likewise, with DRAIN_S.
* end of standard input: the parent has gone, however it went (kill -9 included): SIGKILL to the group.
* Java has gone by itself: its workers are killed, ``exit CODE`` is printed, RUN_DIR stays for the parent.

On its way out it removes RUN_DIR. On Linux the kernel kills Java when this process is killed
(PR_SET_PDEATHSIG), and TorchServe's workers leave by themselves once Java's socket closes.

Knows nothing about TorchServe. It cannot clean up when it and its parent are both killed with SIGKILL: then
Java dies with it, idle workers follow, and RUN_DIR stays behind.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys

__all__ = ["main"]

PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Run in the child before exec: have the kernel kill it when its parent dies (Linux)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _kill_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.write(1, f"{text}\n".encode())


def _end(java: subprocess.Popen[bytes], drain_s: float) -> None:
    """SIGTERM to Java, then SIGKILL to all that is left of its group."""
    if drain_s > 0 and java.poll() is None:
        java.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            java.wait(drain_s)
    _kill_group(java.pid, signal.SIGKILL)
    java.wait()


def _wait(java: subprocess.Popen[bytes], wake: int, drain_s: float, terminated: list[int]) -> float:
    """Wait for a reason to end; returns the seconds to drain."""
    told = False
    typed = b""
    while True:
        select.select([0, wake], [], [])
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
        if not told and java.poll() is not None:
            told = True
            _kill_group(java.pid, signal.SIGKILL)
            _tell(f"exit {java.returncode}")
        if terminated:
            return drain_s
        if select.select([0], [], [], 0)[0]:
            piece = os.read(0, 4096)
            if not piece:
                return 0.0
            typed += piece
            if b"\n" in typed:
                words = typed.split()
                return float(words[1]) if len(words) > 1 else drain_s


def main(argv: list[str]) -> int:
    """Guard one Java process; returns 0 once everything is gone."""
    run_dir, drain_s, log = argv[0], float(argv[1]), argv[2]
    command = argv[argv.index("--") + 1 :]
    terminated: list[int] = []
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with contextlib.ExitStack() as stack:
            out = 2 if log == "-" else stack.enter_context(open(log, "ab")).fileno()
            java = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=run_dir,
                process_group=0,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                restore_signals=True,
            )
        _tell(f"pid {java.pid}")
        seconds = _wait(java, reading, drain_s, terminated)
        _end(java, seconds)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
