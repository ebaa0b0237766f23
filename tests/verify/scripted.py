"""Both sides of a verification without a model: a TorchServe and a native model that answer as scripted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from serve import errors

LIDAR_BOX = [10.0, 2.0, -1.0, 3.9, 1.6, 1.5, 0.1]
# Body and option headers (as {"score_thr": "0.3"}) to detections.
Answer = Callable[[bytes, Mapping[str, str]], Mapping[str, Any]]


class FakeTorchServe(ThreadingHTTPServer):
    """Answers with ``self.answer(body, options)``; an exception of our tree becomes its error body."""

    daemon_threads = True
    answer: Answer

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, str]]] = []
        super().__init__(("127.0.0.1", 0), _Answering)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Answering(BaseHTTPRequestHandler):
    server: FakeTorchServe

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        options = {
            name[2:].lower().replace("-", "_"): value
            for name, value in self.headers.items()
            if name.lower().startswith("x-")
        }
        self.server.asked.append((self.path, options))
        try:
            status, answer = 200, self.server.answer(body, options)
        except errors.ServeError as error:
            status, answer = error.status, errors.error_body(error)
        encoded = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None: ...


@dataclass
class Scripted:
    """A native model that answers from a table: file name → detections."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    modality: Any = "lidar"
    classes: tuple[str, ...] = ("Pedestrian", "Cyclist", "Car")
    box_type_3d: str | None = "LiDAR"
    load_dim: int | None = 4

    def detect(self, path: Path, variant: int = 0) -> dict[str, Any]:
        return self.found.get(path.name) or lidar_answer()


def lidar_answer(*scores: float, box: list[float] = LIDAR_BOX, **more: Any) -> dict[str, Any]:
    return {
        "bboxes_3d": [box] * len(scores),
        "scores_3d": list(scores),
        "labels_3d": [2] * len(scores),
        "names": ["Car"] * len(scores),
        "box_type_3d": "LiDAR",
        **more,
    }
