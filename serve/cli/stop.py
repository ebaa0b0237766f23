"""``mmdet3d-serve stop``: end what ``serve`` or ``demo`` left running."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve.cli.entry import command_parser
from serve.cli.serve import STATE_DIR
from serve.torchserve import stop_running

__all__ = ["main", "stop_all"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and stop."""
    parser = command_parser(
        "stop", "Stop the servers noted in --state-dir; requests in flight are answered first.", ["stop"]
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=STATE_DIR,
        metavar="DIR",
        help="folder where running servers are noted (default: %(default)s)",
    )
    return stop_all(parser.parse_args(argv).state_dir)


def stop_all(state_dir: Path) -> int:
    """Stop the servers noted in `state_dir` and print their addresses; returns 0."""
    addresses = stop_running(state_dir)
    print("\n".join(f"stopped {address}" for address in addresses) or "no running server found")
    return 0
