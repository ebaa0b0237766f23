"""Serve the demonstration SECOND (`make demo`); see `serve.cli.demo`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.demo import demo

if __name__ == "__main__":
    raise SystemExit(run(demo))
