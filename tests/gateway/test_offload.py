"""Long bodies are worked on beside the event loop, texts one after another."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.gateway.offload import QUICK_BYTES, run_beside_loop

LONG = QUICK_BYTES + 1


class Gauge:
    """A call that waits until it is let go; `most` is how many ran at once."""

    def __init__(self) -> None:
        self.gate, self.second = threading.Event(), threading.Event()
        self.running = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, value: int) -> int:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            if self.most > 1:
                self.second.set()
        self.gate.wait(10)
        with self._lock:
            self.running -= 1
        return value


@pytest.mark.parametrize(("text_bytes", "most"), [(LONG, 1), (12, 2)], ids=["text", "tensors"])
def test_long_texts_take_turns_and_tensors_do_not(text_bytes, most):
    gauge = Gauge()

    async def run() -> list[int]:
        calls = asyncio.gather(*(run_beside_loop(LONG, gauge, text_bytes, value) for value in range(2)))
        assert await asyncio.to_thread(gauge.second.wait, 10 if most > 1 else 0.3) == (most > 1)
        gauge.gate.set()
        return list(await calls)

    assert asyncio.run(run()) == [0, 1]
    assert gauge.most == most


def test_failed_text_gives_its_turn_back():
    async def run() -> int:
        with pytest.raises(ValueError, match="invalid literal"):
            await run_beside_loop(LONG, int, LONG, "x")
        return await run_beside_loop(LONG, int, LONG, "7")

    assert asyncio.run(run()) == 7


def test_short_body_is_worked_on_in_the_loop_itself():
    async def run() -> int:
        return await run_beside_loop(QUICK_BYTES, threading.get_ident, QUICK_BYTES)

    assert asyncio.run(run()) == threading.get_ident()
