"""Guard process between the server and Java: stops TorchServe on request, or when its parent dies.

`guarded_process` runs this file as a script: ``python -I -S guard.py RUN_DIR DRAIN_S LOG -- JAVA ARGUMENTS…``. It
starts Java in a process group of its own (TorchServe's Python workers join it) and then waits for one of:

* ``stop SECONDS`` on standard input: SIGTERM to Java, SIGKILL to the group after SECONDS. SIGTERM to the guard does
  the same with DRAIN_S.
* End of standard input, which means that the parent died, by kill -9 or otherwise: SIGKILL to the group.
* Exit of Java: the guard kills its workers and prints ``exit CODE``; RUN_DIR stays for the parent.

Before exiting, the guard removes RUN_DIR. On Linux the kernel kills Java when the guard is killed (PR_SET_PDEATHSIG),
and TorchServe's workers exit once Java's socket closes. If the guard and its parent are both killed with SIGKILL, Java
and idle workers still exit, but RUN_DIR stays.
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
    """Ask the kernel to kill this process when its parent dies; runs in the child before exec (Linux)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _kill_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _report(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.write(1, f"{text}\n".encode())


def _stop(java: subprocess.Popen[bytes], drain_s: float) -> None:
    """Send SIGTERM to Java, then SIGKILL to the rest of its group."""
    if drain_s > 0 and java.poll() is None:
        java.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            java.wait(drain_s)
    _kill_group(java.pid, signal.SIGKILL)
    java.wait()


def _wait(java: subprocess.Popen[bytes], wake: int, drain_s: float, terminated: list[int]) -> float:
    """Wait for a reason to stop; returns the seconds to drain."""
    reported = False
    received = b""
    while True:
        select.select([0, wake], [], [])
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
        if not reported and java.poll() is not None:
            reported = True
            _kill_group(java.pid, signal.SIGKILL)
            _report(f"exit {java.returncode}")
        if terminated:
            return drain_s
        if select.select([0], [], [], 0)[0]:
            piece = os.read(0, 4096)
            if not piece:
                return 0.0
            received += piece
            if b"\n" in received:
                words = received.split()
                return float(words[1]) if len(words) > 1 else drain_s


def main(argv: list[str]) -> int:
    """Guard one Java process; returns 0 once it and its workers have exited."""
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
        _report(f"pid {java.pid}")
        seconds = _wait(java, reading, drain_s, terminated)
        _stop(java, seconds)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
