"""Bring the archives of a bucket into a model store (also for init containers); see `serve.cli.storage`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.storage import fetch_models

if __name__ == "__main__":
    raise SystemExit(run(fetch_models))
