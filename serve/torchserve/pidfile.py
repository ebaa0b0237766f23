"""Remembers which TorchServe of ours is running, so that ``make stop`` can end it, and no other process.

One small file per server in a folder that the caller chooses. A process id alone proves nothing (ids are used
again), so the process must also have been started when the file says, and be our guard. Knows nothing about
TorchServe.
"""

from __future__ import annotations

import json
from pathlib import Path

import psutil

__all__ = ["remove_pidfile", "stop_running", "write_pidfile"]

_GUARD = str(Path(__file__).with_name("guard.py"))


def write_pidfile(state_dir: Path, guard_pid: int, address: str) -> None:
    """Note a running server; `address` is what a person knows it by."""
    state_dir.mkdir(parents=True, exist_ok=True)
    state = {"pid": guard_pid, "started": psutil.Process(guard_pid).create_time(), "address": address}
    _file(state_dir, guard_pid).write_text(json.dumps(state) + "\n")


def remove_pidfile(state_dir: Path, guard_pid: int) -> None:
    """Remove the note of a server."""
    _file(state_dir, guard_pid).unlink(missing_ok=True)


def stop_running(state_dir: Path, timeout_s: float = 20.0) -> list[str]:
    """End every server that is noted in `state_dir` and still runs.

    Args:
        state_dir: folder given to `write_pidfile`; it need not exist.
        timeout_s: seconds to wait for each before it is killed.

    Returns:
        Addresses of the servers that were ended.
    """
    ended: list[str] = []
    for path in sorted(state_dir.glob("torchserve-*.json")):
        try:
            state = json.loads(path.read_text())
            pid, started, address = int(state["pid"]), float(state["started"]), str(state["address"])
        except (OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)
            continue
        try:
            guard = psutil.Process(pid)
            if abs(guard.create_time() - started) < 1.0 and any(_GUARD in word for word in guard.cmdline()):
                guard.terminate()
                _wait(guard, timeout_s)
                ended.append(address)
        except psutil.NoSuchProcess:
            pass
        path.unlink(missing_ok=True)
    return ended


def _wait(guard: psutil.Process, timeout_s: float) -> None:
    try:
        guard.wait(timeout_s)
    except psutil.TimeoutExpired:
        family = guard.children(recursive=True)
        for process in [*family, guard]:
            process.kill()
        psutil.wait_procs([*family, guard], timeout=5)


def _file(state_dir: Path, guard_pid: int) -> Path:
    return state_dir / f"torchserve-{guard_pid}.json"
