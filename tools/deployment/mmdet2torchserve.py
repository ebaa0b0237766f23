"""Convert a mmdet config and checkpoint to a TorchServe archive; see `serve.cli.archive`."""

from __future__ import annotations

from collections.abc import Sequence

from serve.cli import run
from serve.cli.archive import to_torchserve


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert."""
    return to_torchserve(argv, "mmdet")


if __name__ == "__main__":
    raise SystemExit(run(main))
