"""Lifecycle of the gateway: serving, then draining."""

from __future__ import annotations

__all__ = ["Lifecycle"]


class Lifecycle:
    """Shared flag that says whether the gateway is shutting down."""

    def __init__(self) -> None:
        self.draining = False

    def drain(self) -> None:
        """Fail readiness from now on."""
        self.draining = True
