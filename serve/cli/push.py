"""``mmdet3d-serve push``: upload archives to a bucket, each with its sha256."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve import archive
from serve.archive import store
from serve.cli.entry import command_parser, stage_reporter

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, verify every archive, upload."""
    parser = command_parser(
        "push",
        "Verify archives (.mar) and upload them to a bucket under their file names, each with its sha256. Credentials: "
        "the environment, `aws configure` or the machine's role.",
        ["push model-store/second.mar --to s3://bucket/models"],
    )
    parser.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE", help="archive to upload (.mar)")
    parser.add_argument("--to", required=True, metavar="URI", help="s3://bucket/models")
    parser.add_argument("-f", "--force", action="store_true", help="replace existing archives")
    args = parser.parse_args(argv)
    report = stage_reporter()
    for path in args.archives:
        report(f"verifying {path}")
        archive.verify(path)
    for path in args.archives:
        print(f"uploaded  {store.publish(path, args.to, force=args.force)}", flush=True)
    return 0
