"""Fixtures for all tests: free ports, tiny archives for TorchServe, a watch for what tests leave behind."""

from __future__ import annotations

import json
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson
import psutil
import pytest

from serve import ops
from tests.worker.context import Context

ops.install()

ASSETS = Path(__file__).parents[1] / "serve" / "assets"
DEMO_CONFIG, DEMO_CHECKPOINT = ASSETS / "second_demo.py", ASSETS / "second_demo.pth"


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


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def demo_mar(store) -> Path:
    from serve.convert import Conversion, convert

    return convert(Conversion(DEMO_CONFIG, DEMO_CHECKPOINT, store, "second")).path


@pytest.fixture(scope="session")
def demo_archive(demo_mar, tmp_path_factory):
    from serve import archive

    return archive.extract(demo_mar, tmp_path_factory.mktemp("opened"))


@pytest.fixture(scope="session")
def detector(demo_archive):
    import torch

    from serve.runtime import load_detector

    return load_detector(demo_archive, torch.device("cpu"))


@pytest.fixture(scope="session")
def street() -> np.ndarray:
    """A synthetic street of some 17,000 points with cars in it."""
    return np.fromfile(ASSETS / "sample.bin", dtype=np.float32).reshape(-1, 4)


@pytest.fixture(scope="session")
def handler(demo_archive):
    from handlers.mmdet3d_handler import MMDet3DHandler

    handler = MMDet3DHandler()
    handler.initialize(Context(demo_archive.root))
    return handler


@pytest.fixture
def ask(handler, demo_archive):
    """Call the handler; returns [(status, document)] per row."""

    def call(*rows, headers=()):
        context = Context(demo_archive.root, headers=headers)
        answers = handler.handle(
            [{"body": row} if not isinstance(row, dict) else row for row in rows], context
        )
        assert len(answers) == len(rows) == len(context.status)
        assert set(context.response_headers.values()) == {"application/json"}
        return [(context.status[i][0], orjson.loads(answer)) for i, answer in enumerate(answers)]

    return call
