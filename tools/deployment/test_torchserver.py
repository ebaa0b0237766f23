"""Compare a served model with native inference: upstream's name of ``mmdet3d-serve verify``."""

from __future__ import annotations

from serve.cli import run
from serve.cli.verify import main

if __name__ == "__main__":
    raise SystemExit(run(main))
