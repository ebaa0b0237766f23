"""Make the environment of the benchmark's native side (`make bench-native`); see `serve.cli.bench`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.bench import bench_native

if __name__ == "__main__":
    raise SystemExit(run(bench_native))
