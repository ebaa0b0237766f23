"""Print the demo SECOND's average precision on held-out scenes (see `tools.demo.evaluation`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from serve.cli.entry import bounded
from tools.demo.evaluation import evaluate
from tools.demo.training import CHECKPOINT, CONFIG


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description="Average precision (bird's-eye view, 40 recall positions) on synthetic scenes never "
        "trained on, by mmdet3d's own inference. Prints a table, then one line of JSON."
    )
    parser.add_argument(
        "--frames", type=bounded(int, 1), default=200, help="number of scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--first", type=bounded(int, 0), default=0, help="first held-out scene (default: %(default)s)"
    )
    parser.add_argument(
        "--min-points",
        type=bounded(int, 0),
        default=5,
        help="ignore boxes with fewer returns inside (default: %(default)s)",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="mmdet3d config (default: the demo's)")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="weights (default: the demo's)")
    parser.add_argument("--device", default="cpu", help="torch device, cpu or cuda:N (default: %(default)s)")
    args = parser.parse_args(argv)
    result = evaluate(
        args.config,
        args.checkpoint,
        frames=args.frames,
        first=args.first,
        min_points=args.min_points,
        device=args.device,
        progress=True,
    )
    print(result.table())
    print(result.json_line())
    return 0
