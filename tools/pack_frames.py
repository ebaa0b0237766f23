"""Pack a folder of frames into one FFRecord file; see `serve.cli.storage`."""

from __future__ import annotations

from serve.cli import run
from serve.cli.storage import pack

if __name__ == "__main__":
    raise SystemExit(run(pack))
