"""Log lines on standard error, one JSON object each, or text for people. Knows no secrets to keep."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

__all__ = ["set_up"]


def set_up(style: str, level: str) -> None:
    """Send everything logged to standard error as ``json`` or ``text``, from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(
            JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=names)
        )
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("httpx", "httpcore", "matplotlib", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
