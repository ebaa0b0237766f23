"""Try one model of every zoo family and write docs/coverage.md (`make zoo-coverage`); see `serve.cli.coverage`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.coverage import zoo_coverage

if __name__ == "__main__":
    raise SystemExit(run(zoo_coverage))
