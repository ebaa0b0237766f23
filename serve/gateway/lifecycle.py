"""Lifecycle of the gateway: serving, then draining, then stopping."""

from __future__ import annotations

import asyncio

__all__ = ["Lifecycle"]


class Lifecycle:
    """Shared state that says whether the gateway is shutting down."""

    def __init__(self) -> None:
        self.draining = False
        self.stopping = asyncio.Event()

    def drain(self) -> None:
        """Fail readiness from now on."""
        self.draining = True

    def stop(self) -> None:
        """Accept nothing new from now on."""
        self.draining = True
        self.stopping.set()
