"""Make an archive of a model by its name (`make archive MODEL=…`); see `serve.cli.conversion`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.conversion import archive_by_name

if __name__ == "__main__":
    raise SystemExit(run(archive_by_name))
