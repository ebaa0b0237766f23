"""Time native inference beside our runtime (`make bench-detector`); see `serve.cli.bench`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.bench import bench_detector

if __name__ == "__main__":
    raise SystemExit(run(bench_detector))
