"""``mmdet3d-serve sample-data``: write a synthetic data set in the layout of a public one, and configs."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from serve.cli.entry import bounded, command_parser
from serve.errors import BadRequest
from serve.synthetic.cityscapes import write_cityscapes
from serve.synthetic.coco import write_coco
from serve.synthetic.kitti import write_kitti
from serve.synthetic.nuimages import write_nuimages
from serve.synthetic.nuscenes import LYFT, write_drives
from serve.synthetic.voc import write_voc

__all__ = ["main"]

ASSETS = Path(__file__).parents[1] / "assets"
Write = Callable[..., dict[str, int]]


@dataclass(frozen=True)
class Kind:
    """A layout.

    Attributes:
        about: what it is, for the help.
        write: writes the data set.
        train: default number of training frames.
        val: default number of validation frames.
        files: what goes with it; the last is the config to use.
        renders: whether `write` takes ``images``.
    """

    about: str
    write: Write
    train: int
    val: int
    files: tuple[str, ...]
    renders: bool = False


_DEMO = ("second_demo.pth", "second_demo.py")
KINDS = {
    "kitti": Kind("LiDAR scenes", write_kitti, 80, 40, (*_DEMO, "second_sample.py"), renders=True),
    "nuscenes": Kind(
        "LiDAR scenes over time", write_drives, 48, 16, (*_DEMO, "nuscenes_sample.py"), renders=True
    ),
    "lyft": Kind(
        "LiDAR scenes over time",
        partial(write_drives, release=LYFT),
        48,
        16,
        (*_DEMO, "lyft_sample.py"),
        renders=True,
    ),
    "coco": Kind("pictures of shapes", write_coco, 400, 100, ("fcos_sample.py",)),
    "voc": Kind("pictures of shapes", write_voc, 400, 100, ("fcos_sample.py", "voc_sample.py")),
    "cityscapes": Kind(
        "pictures of shapes", write_cityscapes, 400, 100, ("fcos_sample.py", "cityscapes_sample.py")
    ),
    "nuimages": Kind(
        "pictures of shapes", write_nuimages, 400, 100, ("fcos_sample.py", "nuimages_sample.py")
    ),
}


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and write the data set, whole or not at all."""
    args = _parser().parse_args(argv)
    folder: Path = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"{folder} exists already; name a folder that does not, or is empty")
    kind = KINDS[args.kind]
    if args.images and not kind.renders:
        raise BadRequest(f"{args.kind} has pictures anyway; leave --images out")
    train = kind.train if args.train is None else args.train
    val = kind.val if args.val is None else args.val
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        images = {"images": args.images} if kind.renders else {}
        counts = kind.write(made, train=train, val=val, first=args.first, progress=_progress, **images)
        for name in kind.files:
            shutil.copyfile(ASSETS / name, made / name)
        os.replace(made, folder)
    print(f"{args.kind:<9} {folder}: {train} training and {val} validation frames")
    print("objects   " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    print(f"config    {folder / kind.files[-1]}")
    return 0


def _progress(frames: range) -> Iterable[int]:
    return tqdm(frames, unit="frame", desc="drawing", file=sys.stderr, disable=None, leave=False)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "sample-data",
        "Write a small synthetic data set: LiDAR scenes in the layout of KITTI, nuScenes or Lyft, or pictures of "
        "shapes in that of COCO, Pascal VOC, Cityscapes or nuImages, with the annotation files that mmdet3d and mmdet "
        "read, and a config to train and test a detector on it. The same arguments give the same files.",
        ["sample-data kitti data/kitti", "sample-data coco data/coco --train 1000"],
    )
    parser.add_argument("kind", choices=tuple(KINDS), help="layout")
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="folder to write; it may not hold anything"
    )
    for split in ("train", "val"):
        sizes = ", ".join(f"{getattr(each, split)} for {kind}" for kind, each in KINDS.items())
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
        "--images",
        action="store_true",
        help="of LiDAR scenes: render the front camera's image of every frame, seconds each",
    )
    return parser
