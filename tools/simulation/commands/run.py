"""``python -m tools.simulation run``: one load on a number of pods, fixed or autoscaled.

Prints a table, then one line of JSON. Exit status: 0 if every frame was answered, 1 if some were refused or late.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from serve.errors import SettingsError
from tools.simulation.commands.options import (
    add_load,
    add_pod,
    format_row,
    heading,
    load_of,
    pod_of,
    progress_bar,
)
from tools.simulation.load import Autoscaling, simulate

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_load(parser)
    add_pod(parser)
    service = parser.add_argument_group("the service")
    service.add_argument(
        "--pods", type=int, default=1, help="pods, with --most-pods the smallest number (default: 1)"
    )
    service.add_argument(
        "--balancing",
        choices=("random", "least"),
        default="random",
        help="any pod, or the less busy one of two random pods (default: random)",
    )
    service.add_argument(
        "--most-pods",
        type=int,
        help="autoscale up to so many pods, as k8s/components/autoscale-on-pending does",
    )
    service.add_argument(
        "--start-s", type=float, default=60.0, help="seconds until a new pod is ready (default: 60)"
    )
    args = parser.parse_args(argv)
    model, load = pod_of(args), load_of(args)
    if args.pods < 1:
        raise SettingsError(f"--pods must be at least 1, not {args.pods}")
    autoscaling = None
    if args.most_pods is not None:
        if args.most_pods < args.pods or args.start_s < 0:
            raise SettingsError("--most-pods must not be less than --pods, nor --start-s less than 0")
        autoscaling = Autoscaling(args.most_pods, start_s=args.start_s)
    with progress_bar(load.warmup_s + load.seconds, f"{args.pods} pods") as progress:
        outcome = simulate(
            model,
            load,
            pods=args.pods,
            balancing=args.balancing,
            autoscaling=autoscaling,
            seed=args.seed,
            progress=progress,
        )
    print(heading())
    print(format_row(args.pods, outcome))
    print(
        json.dumps(
            {"simulation": {"pods": args.pods, "load": asdict(load), "pod": asdict(model)} | asdict(outcome)}
        )
    )
    return int(outcome.answered < outcome.asked)
