"""The watch of a gateway under attack sees a loop that stands still."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests.attacks.gateway_process import LiveWatch, gateway_process


@pytest.mark.timing
def test_watch_sees_a_gateway_that_is_stopped_for_a_moment():
    with gateway_process(inference_url="http://127.0.0.1:9", management_url="http://127.0.0.1:9") as gateway:
        with LiveWatch(gateway.url) as quiet:
            time.sleep(0.3)
        with LiveWatch(gateway.url) as watch:
            os.kill(gateway.process.pid, signal.SIGSTOP)
            waker = threading.Timer(0.5, os.kill, (gateway.process.pid, signal.SIGCONT))
            waker.start()
            waker.join()
    assert len(quiet.waits_s) > 10 and quiet.slowest_s - quiet.stolen_s < 0.1
    assert watch.slowest_s > 0.4
    assert gateway.url.startswith("http://127.0.0.1:")
