"""The life of the gateway in three words: start, serve, drain. Knows no routes."""

from __future__ import annotations

__all__ = ["Life"]


class Life:
    """Whether the gateway is on its way out; the one owner of that word."""

    def __init__(self) -> None:
        self.draining = False

    def drain(self) -> None:
        """From now on readiness says no."""
        self.draining = True
