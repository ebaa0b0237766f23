"""The handler of the serving benchmark: our rows and our answers around a model that sleeps.

It takes framed batches as the real handlers do, so that what is measured is the real contract. Knows no model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from handlers.rows import answer_row, read_row
from handlers.worker_log import thin_out
from serve.benchmark.serving import slept
from serve.errors import ServeError
from serve.wire import encode_json

__all__ = ["SleptHandler"]


class SleptHandler:
    """Answers how long each frame was and how many were in its batch, after the time that a batch takes."""

    def initialize(self, context: Any) -> None:
        """Nothing is loaded."""
        thin_out()

    def handle(self, data: Sequence[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer every row."""
        if context.get_request_header(0, "describe") == "True":
            return [encode_json({"modality": "lidar", "load_dim": 4, "classes": []})]
        rows = [read_row(row, context.get_all_request_header(i)) for i, row in enumerate(data)]
        sizes = [len(entry[0]) for row in rows for entry in row.entries if not isinstance(entry, ServeError)]
        began = time.perf_counter()
        outcomes = iter(slept.answers(sizes))
        seconds = {"inference": time.perf_counter() - began}
        answers = []
        for i, row in enumerate(rows):
            settled = [entry if isinstance(entry, ServeError) else next(outcomes) for entry in row.entries]
            status, content_type, body = answer_row(row.form, settled, context.get_request_id(i), seconds)
            context.set_response_status(status, HTTPStatus(status).phrase, i)
            context.set_response_header(i, "content-type", content_type)
            answers.append(body)
        return answers
