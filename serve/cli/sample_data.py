"""``mmdet3d-serve sample-data``: write a synthetic data set in KITTI's or COCO's layout, and configs."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from serve.cli.entry import bounded, command_parser
from serve.errors import BadRequest
from serve.synthetic.coco import write_coco
from serve.synthetic.kitti import write_kitti

__all__ = ["main"]

ASSETS = Path(__file__).parents[1] / "assets"
# Kind → numbers of training and validation frames, and the files that go with it; the last is the config to use.
KINDS = {
    "kitti": (80, 40, ("second_demo.pth", "second_demo.py", "second_sample.py")),
    "coco": (400, 100, ("fcos_sample.py",)),
}


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and write the data set, whole or not at all."""
    args = _parser().parse_args(argv)
    folder: Path = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"{folder} exists already; name a folder that does not, or is empty")
    default_train, default_val, configs = KINDS[args.kind]
    train = default_train if args.train is None else args.train
    val = default_val if args.val is None else args.val
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        if args.kind == "kitti":
            counts = write_kitti(
                made, train=train, val=val, first=args.first, images=args.images, progress=_progress
            )
        else:
            counts = write_coco(made, train=train, val=val, first=args.first, progress=_progress)
        for name in configs:
            shutil.copyfile(ASSETS / name, made / name)
        os.replace(made, folder)
    print(f"{args.kind:<10}{folder}: {train} training and {val} validation frames")
    print("objects   " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    print(f"config    {folder / configs[-1]}")
    return 0


def _progress(frames: range) -> Iterable[int]:
    return tqdm(frames, unit="frame", desc="drawing", file=sys.stderr, disable=None, leave=False)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "sample-data",
        "Write a small synthetic data set: LiDAR scenes in KITTI's layout, or pictures of shapes in COCO's, with the "
        "annotation files that mmdet3d and mmdet read, and a config to train and test a detector on it. The same "
        "arguments give the same files.",
        ["sample-data kitti data/kitti", "sample-data coco data/coco --train 1000"],
    )
    parser.add_argument("kind", choices=tuple(KINDS), help="layout")
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="folder to write; it may not hold anything"
    )
    for split in ("train", "val"):
        sizes = ", ".join(f"{each[split == 'val']} for {kind}" for kind, each in KINDS.items())
        parser.add_argument(
            f"--{split}",
            type=bounded(int, 1, 900_000),
            metavar="N",
            help=f"number of {split} frames (default: {sizes})",
        )
    parser.add_argument(
        "--first",
        type=bounded(int, 0, 90_000),
        default=0,
        metavar="N",
        help="first scene or picture (default: %(default)s)",
    )
    parser.add_argument(
        "--images", action="store_true", help="kitti: render the camera's image of every frame, seconds each"
    )
    return parser
