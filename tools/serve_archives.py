"""Serve archives with TorchServe in the foreground (`make serve`, `make stop`); see `serve.cli.serving`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.serving import serve_archives

if __name__ == "__main__":
    raise SystemExit(run(serve_archives))
