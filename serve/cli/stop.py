"""``mmdet3d-serve stop``: end what ``serve`` or ``demo`` left running."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve.cli.entry import command_parser
from serve.cli.serve import STATE_DIR
from serve.torchserve import stop_running

__all__ = ["main"]


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
    args = parser.parse_args(argv)
    ended = stop_running(args.state_dir)
    print("\n".join(f"stopped {address}" for address in ended) or "no running server found")
    return 0
