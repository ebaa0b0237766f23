"""``mmdet3d-serve fetch``: fetch archives of a bucket into a folder and check their hashes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from serve.archive import store
from serve.cli.entry import command_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and fetch."""
    parser = command_parser(
        "fetch",
        "Fetch archives (.mar) of a bucket into a folder for TorchServe. Each is checked against the sha256 of its "
        "upload and against the hashes inside it before it replaces a file; an archive that is in the folder already "
        "is not fetched again. Credentials: the environment, `aws configure` or the machine's role.",
        [
            "fetch --from s3://bucket/models --to model-store",
            "fetch --from s3://bucket/models --to model-store --models second pointpillars",
        ],
    )
    parser.add_argument("--from", dest="source", required=True, metavar="URI", help="s3://bucket/models")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="model store, created if missing"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the archives, without .mar (default: all)",
    )
    args = parser.parse_args(argv)
    for one in store.fetch(args.source, args.to, args.models, report=_print_fetched):
        if not one.has_store_hash:
            print(
                f"note: the bucket has no sha256 for {one.path.name}; only the hashes inside it were compared. "
                "`mmdet3d-serve push` records it",
                file=sys.stderr,
            )
    return 0


def _print_fetched(one: store.FetchedArchive) -> None:
    state = "unchanged" if one.already_present else f"fetched, {one.path.stat().st_size / 1e6:.1f} MB"
    print(f"{one.path} ({state})  sha256 {one.sha256}", flush=True)
