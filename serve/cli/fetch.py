"""``mmdet3d-serve fetch``: bring the archives of a bucket into a folder, hashes checked."""

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
        "Bring the archives (.mar) of a bucket into a folder for TorchServe. Each is checked against the sha256 it "
        "was uploaded with and against the hashes inside it before it takes its place; an archive that is there "
        "already is not fetched again. Credentials: the environment, `aws configure` or the machine's role.",
        [
            "fetch --from s3://bucket/models --to model-store",
            "fetch --from s3://bucket/models --to model-store --models second pointpillars",
        ],
    )
    parser.add_argument("--from", dest="source", required=True, metavar="URI", help="s3://bucket/models")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="model store; made if missing")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="only these, without .mar (default: all)"
    )
    args = parser.parse_args(argv)
    for one in store.fetch(args.source, args.to, args.models, report=_print_fetched):
        if not one.has_store_hash:
            print(
                f"note: the bucket holds no sha256 for {one.path.name}; only the hashes inside it were compared. "
                "`mmdet3d-serve push` uploads archives with theirs",
                file=sys.stderr,
            )
    return 0


def _print_fetched(one: store.FetchedArchive) -> None:
    what = "there already" if one.already_present else f"fetched, {one.path.stat().st_size / 1e6:.1f} MB"
    print(f"{one.path} ({what})  sha256 {one.sha256}", flush=True)
