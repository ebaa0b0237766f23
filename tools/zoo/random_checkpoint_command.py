"""``python -m tools.zoo random-checkpoint``: random weights for testing a model offline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from serve import zoo
from serve.cli.entry import stage_reporter

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, write the checkpoint."""
    parser = argparse.ArgumentParser(
        description="Write a checkpoint of random weights, scaled on a synthetic frame so that the model detects "
        "something. For testing and timing a model; its detections are meaningless."
    )
    parser.add_argument("config", help="path of a config, or the name of a model in the zoo")
    parser.add_argument("out", type=Path, help="the .pth to write")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    report = stage_reporter()
    report("loading torch and the model zoo")
    from serve.convert import configured_classes, resolve_config
    from serve.convert.random_weights import write_random_checkpoint

    report(f"reading the config {args.config}")
    config = resolve_config(zoo.resolve(args.config).config_path).config
    report("building the network and scaling its weights on one frame")
    write_random_checkpoint(config, tuple(configured_classes(config)), args.out, args.seed)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0
