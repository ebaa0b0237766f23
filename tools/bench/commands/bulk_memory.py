"""``python -m tools.bench bulk-memory``: peak memory of a run over very many frames.

The names are invented and the model answers at once; listing, manifest, parts, processes, results and their counts are
the real ones. Each number of frames runs in a process of its own. Stopped by `--seconds`, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from multiprocessing import active_children
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serve.bulk.destination import Destination
from serve.bulk.listing import sorted_frames
from serve.bulk.parts import Job
from serve.bulk.processes import LocalEngine
from serve.bulk.run import BulkRun, execute, plan_run
from serve.cli.entry import bounded
from serve.predict.frames import Clip, Frame
from serve.predict.models import outcome_of
from serve.predict.sources import Source, frame_at
from serve.protocol.batch import Body
from serve.protocol.frame_spec import Modality
from serve.protocol.options import FrameOptions
from serve.protocol.worker import Outcome

__all__ = ["main"]

_CLIP = Clip("bulk")
_STEP = 7919  # prime: names are found in another order than sorted


def main(argv: Sequence[str] | None) -> int:
    """Measure and print a row per number of frames; 1 if one was stopped."""
    args = _parser().parse_args(argv)
    if args.one:
        print(json.dumps(_run_one(args.frames[0], args.out, args.processes, args.seconds)))
        return 0
    print("| frames | finished | coordinator, MiB | largest process, MiB | listed in, s | frames/s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    stopped = False
    for frames in args.frames:
        command = [sys.executable, "-m", "tools.bench", "bulk-memory", "--one", str(frames)]
        command += [
            "--out",
            str(args.out),
            "--processes",
            str(args.processes),
            "--seconds",
            str(args.seconds),
        ]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        stopped = stopped or found["finished"] < frames
        print(
            f"| {frames:,} | {found['finished']:,} | {found['coordinator']:.0f} | {found['process']:.0f} "
            f"| {found['listed_s']:.1f} | {found['rate']:.0f} |",
            flush=True,
        )
    return int(stopped)


def _run_one(frames: int, out: Path, processes: int, seconds: float) -> dict[str, float]:
    """Plan and compute, or go on, for at most `seconds`; returns peaks of memory in MiB."""
    out.mkdir(parents=True, exist_ok=True)
    body = out / "frame.bin"
    body.write_bytes(b"0123456789abcdef" * 4)
    destination = Destination(str(out / str(frames)))
    run = BulkRun(Job("none", False, FrameOptions(), 64, _open_instant), {"frames": frames}, 500)
    started = time.monotonic()
    finished = computed = 0
    peaks = [0.0]
    began = started
    with ExitStack() as stack:
        source = Source("invented names", None, False, (_CLIP,), (_invented(frames, str(body)),))
        plan = plan_run(run, destination, lambda: source, stack, overwrite=False)
        listed_s = time.monotonic() - started
        finished = plan.frames_finished

        def advance(count: int) -> None:
            nonlocal computed
            computed += count
            peaks.extend(_peak_mib(child.pid) for child in active_children())
            peaks[:] = [max(peaks)]

        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        began = time.monotonic()
        with suppress(KeyboardInterrupt):
            execute(run, plan, destination, LocalEngine(("cpu",) * processes, 1), advance)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {
        "finished": finished + computed,
        "coordinator": _peak_mib(os.getpid()),
        "process": max(peaks),
        "listed_s": listed_s,
        "rate": computed / (time.monotonic() - began),
    }


def _peak_mib(process: int | None) -> float:
    """Read the peak of resident memory of a process; `ru_maxrss` of a child would begin with that of its parent."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has ended
        return 0.0
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found.group(1)) / 1024 if found else 0.0


def _invented(frames: int, body: str) -> Iterator[Frame]:
    """Invent names, sort them as those of a folder, and let all be one file."""
    names = (f"drive-{k * _STEP % frames:09d}.bin" for k in range(frames))
    for frame in sorted_frames(names, "/"):
        yield frame_at(frame.name, frame.stem, body, _CLIP)


def _open_instant(archive: Path, device: str, *, trust_code: bool, threads: int) -> _InstantModel:
    return _InstantModel()


class _InstantModel:
    """Model that answers at once."""

    modality: Modality = "lidar"
    load_dim = 4
    is_remote = False
    identity = MappingProxyType({"name": "instant", "version": "1.0"})
    description = MappingProxyType({"modality": "lidar", "load_dim": 4})

    def prepare(self, body: Body, options: FrameOptions) -> Body:
        """Take a frame as it is."""
        return body

    def submit(self, prepared: Sequence[Future[Any]]) -> Future[list[Outcome]]:
        """Answer a batch."""
        done: Future[list[Outcome]] = Future()
        done.set_result([{"names": ["Car"], "bytes": len(outcome_of(each))} for each in prepared])
        return done

    def close(self) -> None:
        """Keep nothing open."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench bulk-memory", description=__doc__)
    count = bounded(int, 1)
    parser.add_argument(
        "frames",
        nargs="*",
        type=count,
        default=[100_000, 1_000_000],
        help="numbers (default: 100000 1000000)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; 400 bytes for a frame"
    )
    parser.add_argument("--processes", type=count, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--seconds", type=bounded(float, 0.1), default=3600.0, help="stop each after so long (default: 3600)"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser
