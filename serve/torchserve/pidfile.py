"""Pid files of running servers, by which ``mmdet3d-serve stop`` finds them and no other process.

One file per server in a given folder. Process ids are reused, so the process must also have the recorded start time
and be a guard (`serve.torchserve.guard`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not installed where only the gateway runs, which imports this package's client
    import psutil

__all__ = ["remove_pidfile", "stop_running", "write_pidfile"]

_GUARD = str(Path(__file__).with_name("guard.py"))


def write_pidfile(state_dir: Path, guard_pid: int, address: str) -> None:
    """Write the pid file of a running server; `address` is its URL, shown to people."""
    import psutil

    state_dir.mkdir(parents=True, exist_ok=True)
    record = {"pid": guard_pid, "started": psutil.Process(guard_pid).create_time(), "address": address}
    _pidfile(state_dir, guard_pid).write_text(json.dumps(record) + "\n")


def remove_pidfile(state_dir: Path, guard_pid: int) -> None:
    """Remove the pid file of a server."""
    _pidfile(state_dir, guard_pid).unlink(missing_ok=True)


def stop_running(state_dir: Path, timeout_s: float = 20.0) -> list[str]:
    """Stop every running server with a pid file in `state_dir`.

    Args:
        state_dir: folder given to `write_pidfile`; it need not exist.
        timeout_s: seconds to wait for each before it is killed.

    Returns:
        Addresses of the stopped servers.
    """
    import psutil

    stopped: list[str] = []
    for path in sorted(state_dir.glob("torchserve-*.json")):
        try:
            record = json.loads(path.read_text())
            pid, started, address = int(record["pid"]), float(record["started"]), str(record["address"])
        except (OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)
            continue
        try:
            guard = psutil.Process(pid)
            if abs(guard.create_time() - started) < 1.0 and any(_GUARD in word for word in guard.cmdline()):
                guard.terminate()
                _wait(guard, timeout_s)
                stopped.append(address)
        except psutil.NoSuchProcess:
            pass
        path.unlink(missing_ok=True)
    return stopped


def _wait(guard: psutil.Process, timeout_s: float) -> None:
    import psutil

    try:
        guard.wait(timeout_s)
    except psutil.TimeoutExpired:
        tree = [*guard.children(recursive=True), guard]
        for process in tree:
            process.kill()
        psutil.wait_procs(tree, timeout=5)


def _pidfile(state_dir: Path, guard_pid: int) -> Path:
    return state_dir / f"torchserve-{guard_pid}.json"
