"""Work in proportion to a body: done at once if the body is short, else in a thread, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["QUICK_BYTES", "run_beside_loop"]

# Text of this length is parsed and checked in less than 10 ms, whatever it holds.
QUICK_BYTES = 64 * 1024
P = ParamSpec("P")
T = TypeVar("T")


async def run_beside_loop(nbytes: int, call: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Call, and return what the call returns; in a thread if it works on more than `QUICK_BYTES`.

    The thread shares the interpreter with the loop: the call must not spend long in one function written in C.
    """
    if nbytes <= QUICK_BYTES:
        return call(*arguments, **keywords)
    return await asyncio.to_thread(call, *arguments, **keywords)
