"""``mmdet3d-serve zoo``: list the models of the zoo by name."""

from __future__ import annotations

from collections.abc import Sequence

from serve import zoo
from serve.cli.entry import command_parser
from serve.errors import ModelLookupError

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and list."""
    parser = command_parser(
        "zoo",
        "List the models of the installed mmdet and mmdet3d zoos; `archive` accepts each name.",
        ["zoo second kitti", "zoo faster-rcnn"],
    )
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="list only names with all of these (default: all)"
    )
    args = parser.parse_args(argv)
    query = " ".join(args.words)
    entries = zoo.list_models(query=query)
    if not entries:
        raise ModelLookupError(f"no model name contains '{query}'; `mmdet3d-serve zoo` lists all names")
    for entry in entries:
        weights = "" if entry.weights_url else "  (no published weights)"
        print(f"{entry.package:8} {entry.name}{weights}")
    return 0
