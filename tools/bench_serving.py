"""Measure our gateway beside other servers (`make bench-serving`); see `serve.cli.bench_serving`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.bench_serving import bench_serving

if __name__ == "__main__":
    raise SystemExit(run(bench_serving))
