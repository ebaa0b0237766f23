"""``python -m tools.simulation size``: fewest pods that answer every frame of a load within a latency.

Adds half as many pods until they hold the latency, then halves the interval, to 2 % of a large number. Prints what was
tried, then one line of JSON. Exit status: 0 if a number was found, 1 if 16,384 pods do not hold it.
"""

from __future__ import annotations

import argparse
import json
import math
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
from tools.simulation.load import Outcome, simulate

__all__ = ["main"]

_MOST_PODS = 16_384


def main(argv: Sequence[str] | None) -> int:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_load(parser)
    add_pod(parser)
    parser.add_argument("--p99-ms", type=float, required=True, help="99th percentile of the latency to hold")
    parser.add_argument(
        "--balancing",
        choices=("random", "least"),
        default="random",
        help="any pod, or the less busy one of two random pods (default: random)",
    )
    parser.add_argument(
        "--price", type=float, help="price of a pod per hour, in any currency; prints that of 1,000 frames"
    )
    args = parser.parse_args(argv)
    model, load = pod_of(args), load_of(args)
    if load.clients:
        raise SettingsError("clients in a closed loop slow down with the service; give --rate")
    if args.p99_ms <= (least_ms := model.lone_s * 1e3):
        raise SettingsError(f"--p99-ms {args.p99_ms:g}: one frame alone takes {least_ms:g} ms")
    if args.price is not None and args.price < 0:
        raise SettingsError(f"--price must be at least 0, not {args.price}")
    print(heading())

    def measure(pods: int) -> Outcome:
        with progress_bar(load.warmup_s + load.seconds, f"{pods} pods") as progress:
            outcome = simulate(
                model, load, pods=pods, balancing=args.balancing, seed=args.seed, progress=progress
            )
        print(format_row(pods, outcome), flush=True)
        if not outcome.asked:
            raise SettingsError(f"no frame arrives within --seconds {args.seconds:g}; raise it")
        return outcome

    def holds(outcome: Outcome) -> bool:
        return (
            outcome.answered == outcome.asked and outcome.p99_ms is not None and outcome.p99_ms <= args.p99_ms
        )

    highest = load.rate * (load.burst.factor if load.burst else 1.0)
    tried: dict[int, Outcome] = {}
    pods = max(1, math.floor(load.rate / model.frames_per_s))
    while not holds(tried.setdefault(pods, measure(pods))):
        if pods >= _MOST_PODS:
            print(f"{pods} pods do not hold {args.p99_ms:g} ms")
            return 1
        pods = min(_MOST_PODS, max(pods + 1, math.ceil(pods * 1.5)))
    low = max((count for count, outcome in tried.items() if not holds(outcome)), default=0)
    while pods - low > max(1, pods // 50):
        middle = (low + pods) // 2
        if holds(tried.setdefault(middle, measure(middle))):
            pods = middle
        else:
            low = middle
    found = tried[pods]
    capacity = pods * model.frames_per_s
    print(
        f"{pods} pods; the highest rate is {highest / capacity:.0%} of what they can answer ({capacity:,.0f} frames/s)"
    )
    if args.price is not None:
        print(f"1,000 frames cost {1e3 * args.price * found.pod_hours / max(1, found.answered):.4g}")
    print(json.dumps({"size": {"pods": pods, "p99_ms": args.p99_ms} | asdict(found)}))
    return 0
