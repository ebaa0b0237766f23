"""A server of the predictions API that answers each known frame with given detections, over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def answering(answers: Mapping[bytes, Any], *, model: str = "made") -> Iterator[str]:
    """Serve `answers`, by the bytes of a frame or of one of its parts, as the model's; yields the address."""

    def answer_to(body: bytes) -> Any:
        if body in answers:
            return answers[body]
        (found,) = (answer for part, answer in answers.items() if part in body)  # of a form
        return found

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            frame = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != f"/predictions/{model}":
                self.reply(404, {"error": {"code": "model_not_found", "message": f"no model {self.path}"}})
            else:
                assert self.headers["X-Score-Thr"] == "0.0"
                self.reply(200, answer_to(frame))

        def reply(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
