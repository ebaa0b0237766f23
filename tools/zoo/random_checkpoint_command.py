"""``python -m tools.zoo random-checkpoint``: weights for trying a model out offline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from serve import zoo

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, write the checkpoint."""
    parser = argparse.ArgumentParser(
        description="Write a checkpoint of random weights, scaled on a made frame so that detections come out. "
        "For trying, testing and timing a model; what it detects means nothing."
    )
    parser.add_argument("config", help="config file or name of a model in the zoo")
    parser.add_argument("out", type=Path, help="the .pth to write")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    from serve.convert import configured_classes, resolve_config
    from tools.zoo.random_weights import write_random_checkpoint

    config, _ = resolve_config(zoo.resolve(args.config).config_path)
    write_random_checkpoint(config, tuple(configured_classes(config)), args.out, args.seed)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0
