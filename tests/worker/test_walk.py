"""The way of one frame through a worker, as a list of files (docs/architecture/03-worker.md)."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import serve
from serve.gateway.worker_client import WorkerSockets
from serve.protocol.batch import unpack_outcomes
from serve.protocol.worker import EncodedFrame, batch_chunks
from serve.worker.server import listen

FOLDER = Path(serve.__file__).parent
PAGE = FOLDER.parent / "docs" / "architecture" / "03-worker.md"
MOST_FILES = 5


def listed(heading: str) -> set[str]:
    """The files of the worker and its runtime that a section of the page names."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"`((?:worker|runtime)/\w+\.py)`", section))


@pytest.mark.slow
def test_frame_passes_through_the_listed_files_and_no_more_than_five(handler, street, tmp_path):
    entered: set[str] = set()

    def trace(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(FOLDER)):
            entered.add(str(Path(frame.f_code.co_filename).relative_to(FOLDER)))

    async def ask() -> bytes:
        sockets = WorkerSockets(tmp_path)
        try:
            answer = await sockets.call([os.getpid()], batch_chunks([EncodedFrame(street.tobytes())]), 60.0)
        finally:
            sockets.close()
        assert answer is not None
        return bytes(answer)

    threading.setprofile(trace)  # the threads of the socket start in this block
    handler.run_in_engine(lambda: sys.setprofile(trace))
    try:
        with closing(listen(tmp_path, handler.respond)):
            answer = asyncio.run(ask())
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        handler.run_in_engine(lambda: sys.setprofile(None))
    ((status, _),) = unpack_outcomes(answer).items
    assert status == 200
    walk, beside = listed("The way of a frame"), listed("Beside the way")
    assert len(walk - beside) <= MOST_FILES
    ours = {file for file in entered if file.startswith(("worker/", "runtime/"))}
    assert walk - beside <= ours
    assert ours - walk <= beside, sorted(ours - walk - beside)
