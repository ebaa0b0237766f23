"""Flags that the commands share: what a pod does, what arrives."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from serve.errors import SettingsError
from tools.simulation.load import Burst, Load, Outcome
from tools.simulation.service import PodModel

__all__ = [
    "add_load",
    "add_pod",
    "check_finite",
    "format_row",
    "heading",
    "load_of",
    "pod_of",
    "progress_bar",
]


def add_pod(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a pod; the defaults are the serving benchmark's sleeping model with frames of 16 kB."""
    pod = parser.add_argument_group("a pod, from what `make bench NAME=serving` or NAME=workers measured")
    pod.add_argument(
        "--batch-ms", type=float, default=20.0, help="milliseconds of a batch beside its frames (default: 20)"
    )
    pod.add_argument("--frame-ms", type=float, default=2.0, help="milliseconds of each frame (default: 2)")
    pod.add_argument("--workers", type=int, default=1, help="workers of a pod (default: 1)")
    pod.add_argument("--batch-frames", type=int, default=16, help="most frames of a batch (default: 16)")
    pod.add_argument(
        "--gateway-ms",
        type=float,
        default=0.25,
        help="CPU milliseconds of the gateway per frame (default: 0.25)",
    )
    pod.add_argument("--gateways", type=int, default=1, help="gateway processes of a pod (default: 1)")
    pod.add_argument(
        "--transport-ms",
        type=float,
        default=1.6,
        help="milliseconds to an idle worker and back (default: 1.6)",
    )
    pod.add_argument(
        "--max-pending-frames", type=int, default=256, help="frames in a pod; more get 429 (default: 256)"
    )
    pod.add_argument(
        "--timeout-s", type=float, default=30.0, help="deadline of a frame, seconds (default: 30)"
    )


def add_load(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a load."""
    load = parser.add_argument_group("the load")
    load.add_argument("--rate", type=float, default=0.0, help="frames per second, Poisson arrivals")
    load.add_argument("--clients", type=int, default=0, help="clients that never pause, instead of --rate")
    load.add_argument(
        "--burst",
        type=float,
        nargs=3,
        metavar=("FACTOR", "LENGTH_S", "PERIOD_S"),
        help="FACTOR times the rate for LENGTH_S of every PERIOD_S seconds",
    )
    load.add_argument("--seconds", type=float, default=60.0, help="length of the measurement (default: 60)")
    load.add_argument("--seed", type=int, default=0, help="of arrivals and balancing (default: 0)")


def pod_of(args: argparse.Namespace) -> PodModel:
    """Return the pod that the flags describe.

    Raises:
        SettingsError: a value is out of range.
    """
    check_finite(args)
    for name in ("batch_ms", "gateway_ms", "transport_ms"):
        if getattr(args, name) < 0:
            raise SettingsError(f"{_flag(name)} must be at least 0, not {getattr(args, name)}")
    for name in ("frame_ms", "timeout_s", "workers", "batch_frames", "gateways", "max_pending_frames"):
        if getattr(args, name) <= 0:
            raise SettingsError(f"{_flag(name)} must be more than 0, not {getattr(args, name)}")
    return PodModel(
        batch_s=args.batch_ms / 1e3,
        frame_s=args.frame_ms / 1e3,
        workers=args.workers,
        batch_frames=args.batch_frames,
        gateway_s=args.gateway_ms / 1e3,
        gateways=args.gateways,
        transport_s=args.transport_ms / 1e3,
        max_pending_frames=args.max_pending_frames,
        timeout_s=args.timeout_s,
    )


def load_of(args: argparse.Namespace) -> Load:
    """Return the load that the flags describe.

    Raises:
        SettingsError: a value is out of range, or neither --rate nor --clients is given.
    """
    check_finite(args)
    if (args.rate > 0) == (args.clients > 0) or min(args.rate, args.clients) < 0:
        raise SettingsError("give either --rate or --clients, more than 0")
    if args.seconds <= 0:
        raise SettingsError(f"--seconds must be more than 0, not {args.seconds}")
    burst = None
    if args.burst:
        if not args.rate:
            raise SettingsError("--burst goes with --rate")
        burst = Burst(*args.burst)
        if burst.factor < 1 or not 0 < burst.length_s < burst.period_s:
            raise SettingsError(
                f"--burst {' '.join(map(str, args.burst))}: FACTOR must be at least 1, LENGTH_S less than PERIOD_S"
            )
    return Load(args.rate, args.clients, burst, args.seconds)


def check_finite(args: argparse.Namespace) -> None:
    """Reject NaN and infinity, which no comparison with a bound finds, or which never end.

    Raises:
        SettingsError: a flag has such a value.
    """
    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(each, float) and not math.isfinite(each) for each in numbers):
            raise SettingsError(f"{_flag(name)} must be finite, not {' '.join(map(str, numbers))}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def progress_bar(seconds: float, label: str) -> Iterator[Callable[[float], None]]:
    """Show simulated seconds on standard error; yields what `simulate` calls."""
    bar: tqdm[Any]
    with tqdm(total=round(seconds), unit=" simulated s", desc=label, leave=False) as bar:

        def advance(now: float) -> None:
            bar.update(max(0, round(now) - bar.n))

        yield advance


def heading() -> str:
    """Return the first two lines of the table of outcomes."""
    names = (
        "pods asked answered refused late frames/s p50_ms p99_ms batch workers_busy gateways_busy pod_hours"
    )
    columns = [name.replace("_", " ") for name in names.split()]
    return f"| {' | '.join(columns)} |\n|{' ---: |' * len(columns)}"


def format_row(pods: int, outcome: Outcome) -> str:
    """Return one line of that table."""
    grown = f"{pods}–{outcome.most_pods}" if outcome.most_pods != pods else str(pods)
    p50, p99 = ("–" if value is None else f"{value:.1f}" for value in (outcome.p50_ms, outcome.p99_ms))
    return (
        f"| {grown} | {outcome.asked:,} | {outcome.answered:,} | {outcome.refused:,} | {outcome.late:,} "
        f"| {outcome.frames_per_s:,.1f} | {p50} | {p99} | {outcome.mean_batch:.1f} | {outcome.worker_busy:.0%} "
        f"| {outcome.gateway_busy:.0%} | {outcome.pod_hours:.3f} |"
    )
