"""Write a synthetic LiDAR scene as a KITTI `.bin`, and its ground truth as JSON (see `serve.synthetic.scenes`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from serve.cli.entry import bounded
from serve.synthetic.scenes import SAMPLE_SEED, generate_scene


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, write the files, print a summary."""
    parser = argparse.ArgumentParser(
        description="Write one synthetic LiDAR frame: float32 x, y, z in metres (forward, left, up), "
        "intensity 0 to 1."
    )
    parser.add_argument("out", type=Path, help="the .bin file to write")
    parser.add_argument(
        "--seed",
        type=bounded(int, 0),
        default=SAMPLE_SEED,
        help="scene number, 0 or more (default: %(default)s, the sample frame)",
    )
    parser.add_argument(
        "--ground-truth", type=Path, help="also write boxes (m, rad), labels and names as JSON here"
    )
    args = parser.parse_args(argv)
    scene = generate_scene(args.seed)
    args.out.write_bytes(scene.to_bytes())
    if args.ground_truth is not None:
        args.ground_truth.write_text(scene.ground_truth_json() + "\n", encoding="utf-8")
    print(f"wrote {args.out}: {scene.summary()}")
    return 0
