"""Fast S3 server of one object, to benchmark its readers.

It serves HEAD and GET with ranges and If-Match. Bytes go from the page cache to the socket without passing through
Python (``sendfile``); moto, which the tests use, copies each byte several times and would dominate the measurement.
It checks no signature: only for benchmarks on loopback.

    python -m tools.bench.range_server FILE        prints its port, exits when standard input closes
"""

from __future__ import annotations

import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["main"]

_RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


class _Objects(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    file: Path
    size: int


class _Object(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Objects

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def _answer(self) -> None:
        size, etag = self.server.size, '"benchmark"'
        if self.headers.get("If-Match", etag) != etag:
            self.send_response(412)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = _RANGE.match(self.headers.get("Range", ""))
        first = int(asked.group(1)) if asked else 0
        last = min(int(asked.group(2)) if asked and asked.group(2) else size - 1, size - 1)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.flush()
            with self.server.file.open("rb") as file:
                self.connection.sendfile(file, first, last - first + 1)

    do_GET = do_HEAD = _answer


def main() -> None:
    """Serve the file named on the command line."""
    with _Objects(("127.0.0.1", 0), _Object) as server:
        server.file = Path(sys.argv[1])
        server.size = server.file.stat().st_size
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()
        server.shutdown()


if __name__ == "__main__":
    main()
