"""Train the demo SECOND on synthetic scenes (see `tools.demo.training`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from serve.cli.entry import bounded
from tools.demo.training import CHECKPOINT, TrainingOptions, train


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, train, print the path of the checkpoint."""
    defaults = TrainingOptions()
    parser = argparse.ArgumentParser(
        description="Train the demo SECOND from scratch on synthetic LiDAR scenes, on the CPU. "
        "Ctrl-C leaves an existing checkpoint as it was."
    )
    parser.add_argument(
        "--frames",
        type=bounded(int, 1),
        default=defaults.frames,
        help="different scenes (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=bounded(int, 1),
        default=defaults.epochs,
        help="passes over them (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=bounded(int, 0),
        default=defaults.seed,
        help="scenes, weights, shuffling (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=bounded(int, 1),
        default=defaults.batch_size,
        help="frames per step (default: %(default)s)",
    )
    parser.add_argument(
        "--time-budget-min",
        type=bounded(float, 0, unit="minutes"),
        default=0.0,
        help="end within so many minutes, 0 = no limit (default); a budget ties the result to the clock",
    )
    parser.add_argument(
        "--threads", type=bounded(int, 0), default=0, help="CPU threads, 0 = torch's choice (default)"
    )
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINT, help="checkpoint to write (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    options = TrainingOptions(
        frames=args.frames,
        epochs=args.epochs,
        seed=args.seed,
        batch_size=args.batch_size,
        time_budget_min=args.time_budget_min,
        threads=args.threads,
    )
    written = train(options, args.out, report=lambda line: print(line, flush=True))
    print(f"wrote {written} ({written.stat().st_size / 1e6:.2f} MB)")
    return 0
