"""``python -m serve``: the same as ``mmdet3d-serve``."""

from __future__ import annotations

import sys

from serve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
