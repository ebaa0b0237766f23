"""A real gateway process under attack, and a watch that asks its liveness beside."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).parents[2]
ALLOWED_S = 0.1


@dataclass
class GatewayProcess:
    """`mmdet3d-serve gateway` in a process of its own."""

    url: str
    process: psutil.Process

    def resident_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def pending_bytes(self) -> float:
        """Bytes that requests hold, as the metrics count them."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            found = re.search(r"^\w+_pending_bytes(?:{[^}]*})? (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found
        return float(found[1])

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def gateway_process(**options: Any) -> Iterator[GatewayProcess]:
    """Start a gateway with these options; at the end it must stop on SIGTERM without a traceback in its log."""
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in {"log_level": "error", **options}.items()
    ]
    popen = subprocess.Popen(
        [sys.executable, "-m", "serve", "gateway", "--port", "0", *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert popen.stderr is not None
    with popen, popen.stderr:
        lines: list[str] = []
        url = None
        while url is None and (line := popen.stderr.readline()):
            lines.append(line)
            url = re.search(r"http://\S+", line)
        assert url, "".join(lines)
        # Read on, so that a full pipe cannot stop the gateway.
        reading = threading.Thread(target=lambda: lines.extend(popen.stderr or ()), daemon=True)
        reading.start()
        try:
            yield GatewayProcess(url[0], psutil.Process(popen.pid))
        finally:
            popen.send_signal(signal.SIGTERM)
            try:
                popen.wait(30)
            finally:
                popen.kill()
                reading.join(10)
        assert "Traceback" not in "".join(lines), "".join(lines)[-5000:]


class LiveWatch:
    """Ask ``/health/live`` again and again on one connection, from a thread, while the block runs.

    Attributes:
        waits_s: how long each answer took.

    A machine that gives the thread no core for a while is no fault of the gateway: `stolen_s` is the longest time
    that a thread which only sleeps was late, to be subtracted from a limit.
    """

    def __init__(self, url: str, *, pause_s: float = 0.005) -> None:
        parts = urlsplit(url)
        self.waits_s: list[float] = []
        self.stolen_s = 0.0
        self._address = (parts.hostname or "", parts.port)
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._sleep)]

    @property
    def slowest_s(self) -> float:
        return max(self.waits_s)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)
        if error is None:
            assert self._failed is None, f"/health/live was not answered: {self._failed!r}"
            assert self.waits_s

    def _ask(self) -> None:
        try:
            connection = http.client.HTTPConnection(*self._address, timeout=300)
            while True:
                began = time.monotonic()
                connection.request("GET", "/health/live")
                answer = connection.getresponse()
                answer.read()
                self.waits_s.append(time.monotonic() - began)
                assert answer.status == 200, answer.status
                if self._stop.wait(self._pause_s):
                    connection.close()
                    return
        except Exception as error:
            self._failed = error

    def _sleep(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            time.sleep(self._pause_s)
            self.stolen_s = max(self.stolen_s, time.monotonic() - began - self._pause_s)
