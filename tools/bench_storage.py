"""Time reads of buckets and packed files (`make bench-storage`); see `serve.cli.storage`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.storage import bench_storage

if __name__ == "__main__":
    raise SystemExit(run(bench_storage))
