"""Time the kernels one by one (`make bench-ops`); see `serve.cli.bench_ops`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.bench_ops import bench_ops

if __name__ == "__main__":
    raise SystemExit(run(bench_ops))
