"""``mmdet3d-serve pack``: pack a folder of frames into one FFRecord file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve.cli.entry import command_parser, stage_reporter
from serve.storage.packed_folder import pack_folder

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and pack."""
    parser = command_parser(
        "pack",
        "Pack a folder with all its subfolders into one FFRecord file. ffrecord.PackedFolder reads it, so do "
        "backend='ffrecord' in configs and ffrecord://OUT.ffr#name in the commands.",
        ["pack data/kitti kitti.ffr"],
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to pack; links are followed")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write (.ffr), outside of the folder")
    parser.add_argument("-f", "--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} exists; replace it with --force")
    bar: tqdm[Any]
    stage_reporter()(f"packing {args.folder}")
    with tqdm(unit="file", desc="packing", disable=None, leave=False) as bar:
        count = pack_folder(
            args.folder,
            args.out,
            progress=lambda done, total: _update(bar, done, total),
            require_files=True,
        )
    print(f"packed {count} files into {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _update(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
