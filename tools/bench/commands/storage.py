"""``python -m tools.bench storage``: time reads and packing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from serve.cli.entry import bounded

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, measure, print a table and then one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench storage",
        description="Time s3:// reads against boto3, random FFRecord reads against pread, and packing. Uses this "
        "machine only. Prints a table and then one line of JSON.",
    )
    parser.add_argument(
        "--object-mb",
        type=bounded(int, 1, unit="MB"),
        default=1000,
        help="size of the object, MB of 10^6 bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=bounded(int, 1), default=5, help="counted rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--pack",
        nargs="+",
        type=bounded(int, 1),
        default=[1000, 3000, 10000],
        metavar="N",
        help="files to pack (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    from tools.bench import storage

    result = storage.run(object_bytes=args.object_mb * 10**6, rounds=args.rounds, pack_counts=args.pack)
    print(result.table())
    print(result.json_line(), flush=True)
    return 0
