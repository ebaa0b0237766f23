"""The way of one frame through the gateway, as a list of files (docs/architecture/02-request.md)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from serve import gateway as package
from serve.protocol.batch import Outcomes, pack_outcomes, unpack_frames
from serve.worker.server import listen
from tests.gateway.fake_torchserve import FakeModel, answer_for
from tests.gateway.running import eventually

FOLDER = Path(package.__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "architecture" / "02-request.md"
MOST_FILES = 7


def listed(heading: str) -> list[str]:
    """The files of the numbered list or line below a heading of the page."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"`serve/gateway/([\w/]+\.py)`", section)


def holds(value: Any, frame: bytes, depth: int = 6) -> bool:
    """Whether a value has the bytes of the frame in it."""
    if isinstance(value, bytes | bytearray | memoryview):
        return len(value) >= len(frame) and frame in bytes(value)
    if depth == 0 or value is None or isinstance(value, str | int | float):
        return False
    if isinstance(value, Mapping):
        return any(holds(each, frame, depth - 1) for each in value.values())
    if isinstance(value, list | tuple):
        return any(holds(each, frame, depth - 1) for each in value)
    if type(value).__module__.startswith("serve."):
        return any(holds(each, frame, depth - 1) for each in getattr(value, "__dict__", {}).values())
    return False


class Trace:
    """Files of the gateway in the order in which they were entered, and those that were given the frame."""

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self.entered: list[str] = []
        self.given: list[str] = []

    def __call__(self, frame: Any, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(str(FOLDER)):
            return
        file = str(Path(frame.f_code.co_filename).relative_to(FOLDER))
        if file not in self.entered:
            self.entered.append(file)
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
        own = [frame.f_locals.get(name) for name in names if name != "self"]
        if file not in self.given and holds(own, self.frame):
            self.given.append(file)


@contextmanager
def worker(folder: Path) -> Iterator[None]:
    def answer(body: memoryview, compute_s: float, cancelled: Any) -> bytes:
        frames = [bytes(frame) for frame, _ in unpack_frames(body)]
        return pack_outcomes(Outcomes([(200, answer_for(frame, {})) for frame in frames]))

    with closing(listen(folder, answer)):
        yield


def test_frame_passes_through_the_listed_files_and_no_more_than_seven(
    start_gateway, background, torchserve, tmp_path
):
    torchserve.models["second"]["1.0"] = FakeModel(workers=[os.getpid()])
    body = np.arange(64, dtype=np.float32).tobytes()
    trace = Trace(body)
    with worker(tmp_path):
        gateway = start_gateway(worker_sockets=tmp_path)
        eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
        assert gateway.post(content=body).content == answer_for(body, {})  # connects
        background.soon(sys.setprofile, trace)
        try:
            assert gateway.post(content=body).content == answer_for(body, {})
        finally:
            background.soon(sys.setprofile, None)
    assert not torchserve.calls  # all went to the worker's socket
    walk = listed("The way of a frame")
    assert len(walk) <= MOST_FILES
    assert {*trace.given} == {*walk}, trace.given
    around = listed("Beside the way")
    assert {*trace.entered} - {*walk} <= {*around}, trace.entered
