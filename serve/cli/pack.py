"""``mmdet3d-serve pack``: pack a folder of frames into one FFRecord file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve.cli.entry import command_parser
from serve.storage.packed_folder import pack_folder

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and pack."""
    parser = command_parser(
        "pack",
        "Pack a folder, with all folders in it, into one FFRecord file, which ffrecord.PackedFolder, "
        "backend='ffrecord' in configs and ffrecord://OUT.ffr#name in our commands read.",
        ["pack data/kitti kitti.ffr"],
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what to pack; links are followed")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the file to make (.ffr), outside of the folder"
    )
    parser.add_argument("-f", "--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} exists; replace it with --force")
    bar: tqdm[Any]
    with tqdm(unit="file", desc="packing", disable=None, leave=False) as bar:
        count = pack_folder(args.folder, args.out, progress=lambda done, total: _tick(bar, done, total))
    print(f"packed {count} files into {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _tick(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
