"""TorchServe handler of the sleep model, with the same batches and answers as the real handlers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from serve.errors import ServeError
from serve.protocol.frames import encode_json
from serve.settings import Settings
from serve.worker.log_filters import install_log_filters
from serve.worker.rows import Entry, answer_row, read_batch, read_row
from serve.worker.server import listen
from serve.worker.watchdog import watchdog
from tools.bench.serving import sleep_model

__all__ = ["SleepHandler"]


class SleepHandler:
    """Handler that sleeps as long as a batch takes and answers each frame's size and its batch's size."""

    def initialize(self, context: Any) -> None:
        """Start listening; there is nothing to load."""
        install_log_filters()
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        folder = Settings.from_environment().worker_sockets
        if folder is not None:
            listen(folder, self.answer_batch)

    def handle(self, data: Sequence[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer all rows."""
        if context.get_request_header(0, "describe") == "True":
            return [encode_json({"modality": "lidar", "load_dim": 4, "classes": []})]
        rows = [read_row(row, context.get_all_request_header(i)) for i, row in enumerate(data)]
        settled, seconds = self._sleep([entry for row in rows for entry in row.entries])
        outcomes = iter(settled)
        answers = []
        for i, row in enumerate(rows):
            own = [next(outcomes) for _ in row.entries]
            status, content_type, body = answer_row(row.form, own, context.get_request_id(i), seconds)
            context.set_response_status(status, HTTPStatus(status).phrase, i)
            context.set_response_header(i, "content-type", content_type)
            answers.append(body)
        return answers

    def answer_batch(self, body: memoryview, compute_s: int) -> bytes:
        """Answer a batch that came through the worker socket."""
        settled, seconds = self._sleep(read_batch(body), compute_s)
        return answer_row("outcomes", settled, None, seconds)[2]

    def _sleep(self, entries: Sequence[Entry], compute_s: int = 0) -> tuple[list[Any], dict[str, float]]:
        """Run one batch at a time; return an outcome per entry and the seconds spent."""
        sizes = [len(entry[0]) for entry in entries if not isinstance(entry, ServeError)]
        answered, inference_s = self._engine.submit(_run, sizes, compute_s).result()
        outcomes = iter(answered)
        settled = [entry if isinstance(entry, ServeError) else next(outcomes) for entry in entries]
        return settled, {"inference": inference_s}


def _run(sizes: Sequence[int], compute_s: int) -> tuple[list[dict[str, int]], float]:
    began = time.perf_counter()
    with watchdog(compute_s):
        return sleep_model.answers(sizes), time.perf_counter() - began
