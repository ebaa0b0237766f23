"""Fixtures for all tests: free ports, tiny archives for TorchServe, a watch for what tests leave behind."""

from __future__ import annotations

import json
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """`free_ports(3)`: that many different ports of 127.0.0.1 on which nothing listens."""
    return pick_free_ports


def pick_free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def write_archive(path: Path, handler: str, name: str | None = None, version: str = "1.0") -> Path:
    """A minimal TorchServe archive around the source of a handler; nothing of ours is in it."""
    name = name or path.stem
    model = {"modelName": name, "modelVersion": version, "handler": f"handler_of_{name}.py"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
        archive.writestr(f"handler_of_{name}.py", handler)
    return path


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the session if a process started by a test outlives all tests."""
    yield
    mine = str(tmp_path_factory.getbasetemp())
    left = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter(["cmdline"]):
        if any(mine in word for word in process.info["cmdline"] or ()):
            left[process.pid] = process
    told = [text for process in left.values() if (text := _described(process))]
    assert not told, "tests left processes running:\n" + "\n".join(told)


def _described(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
    # Python's own helper of multiprocessing lives as long as we do.
    return "" if "resource_tracker" in command or not command else f"{process.pid}: {command[:200]}"
