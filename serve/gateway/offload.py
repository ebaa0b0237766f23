"""Work in proportion to a body: done at once if the body is short, else in a thread, beside the event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["QUICK_BYTES", "run_beside_loop"]

# Text of this length is parsed and checked in less than 10 ms, whatever it holds.
QUICK_BYTES = 64 * 1024
# Texts that are parsed at a time: between two looks at the interpreter's lock, the loop waits for all of them.
_TEXTS_AT_ONCE = 1
_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()
P = ParamSpec("P")
T = TypeVar("T")


async def run_beside_loop(
    nbytes: int, call: Callable[P, T], text_bytes: int, *arguments: P.args, **keywords: P.kwargs
) -> T:
    """Call, and return what the call returns; in a thread if it works on more than `QUICK_BYTES`.

    The thread shares the interpreter with the loop: the call must not spend long in one function written in C, and
    calls that parse a long text take turns, so that the loop has one competitor however many such bodies there are.

    Args:
        nbytes: bytes that the call works on.
        call: what to call.
        text_bytes: those of them that it parses; the others it copies, or gives to libraries that free the interpreter.
        arguments: of the call.
        keywords: of the call.
    """
    if nbytes <= QUICK_BYTES:
        return call(*arguments, **keywords)
    if text_bytes <= QUICK_BYTES:
        return await asyncio.to_thread(call, *arguments, **keywords)
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(_TEXTS_AT_ONCE)):
        return await asyncio.to_thread(call, *arguments, **keywords)
