"""``python -m tools.bench bulk-memory``: peak memory of a run over very many frames.

The names are invented and the model answers at once; listing, manifest, parts, processes, results and their counts are
the real ones. Each number of frames runs in a process of its own. Stopped by `--seconds`, the same command goes on.
With `--engine ray`, the largest process is the one that directs Ray, and holds the lines of the frames that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from multiprocessing import active_children
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import psutil

from serve.bulk.destination import Destination
from serve.bulk.listing import sorted_frames
from serve.bulk.parts import Job
from serve.bulk.ray_worker import pack_lines
from serve.bulk.run import BulkRun, execute, plan_run
from serve.cli.entry import bounded
from serve.errors import SetupError
from serve.predict.frames import Clip, Frame
from serve.predict.models import outcome_of
from serve.predict.sources import Source, frame_at
from serve.protocol.batch import Body
from serve.protocol.frame_spec import Modality
from serve.protocol.options import FrameOptions
from serve.protocol.worker import Outcome
from tools.bench.bulk import ENGINES, Setting, engine_of

__all__ = ["main", "measure"]

_CLIP = Clip("bulk")
_STEP = 7919  # prime: names are found in another order than sorted
_ODD = 0x9E3779B97F4A7C15F39CC0605CEDC835  # 2^128 over the golden ratio: multiples spread over all bits
_SAMPLE_S = 0.5


def main(argv: Sequence[str] | None) -> int:
    """Measure and print a row per number of frames; 1 if one was stopped."""
    args = _parser().parse_args(argv)
    if args.one:
        print(json.dumps(_run_one(args)))
        return 0
    print("| frames | finished | coordinator, MiB | largest process, MiB | listed in, s | frames/s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    stopped = False
    for frames in args.frames:
        found = measure(
            frames,
            args.out,
            engine=args.engine,
            names=args.names,
            processes=args.processes,
            seconds=args.seconds,
        )
        stopped = stopped or found["finished"] < frames
        print(
            f"| {frames:,} | {found['finished']:,} | {found['coordinator']:.0f} | {found['process']:.0f} "
            f"| {found['listed_s']:.1f} | {found['rate']:.0f} |",
            flush=True,
        )
    return int(stopped)


def measure(
    frames: int, out: Path, *, engine: str, names: str, processes: int, seconds: float = 3600.0
) -> dict[str, float]:
    """Let a process of its own plan and compute, or go on, for at most `seconds`.

    Args:
        frames: number of frames.
        out: folder for the results, one per number of frames.
        engine: ``local`` or ``ray``.
        names: ``counting`` or ``random``.
        processes: processes with a model.
        seconds: when to stop.

    Returns:
        ``finished`` frames, ``rate`` in frames/s, ``listed_s``, ``packed`` (bytes that a frame's line of the manifest
        takes as it goes to Ray) and, in MiB, the peaks of resident memory of the command (``coordinator``) and of the
        largest process that it has started (``process``), and the largest of the samples of the proportional memory of
        that process (``process_pss``) and of all processes that have no model, the command with them (``beside_pss``).
    """
    command = [sys.executable, "-m", "tools.bench", "bulk-memory", "--one", str(frames), "--out", str(out)]
    command += ["--engine", engine, "--names", names]
    command += ["--processes", str(processes), "--seconds", str(seconds)]
    # In a group of its own, so that Ctrl-C reaches it once: from here.
    with subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise SetupError(f"the run over {frames:,} frames has ended with status {process.returncode}")
    return cast(dict[str, float], json.loads(output))


def _run_one(args: argparse.Namespace) -> dict[str, float]:
    """Plan and compute, or go on, for at most `seconds`; see `measure`."""
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    frames, out = args.frames[0], args.out
    out.mkdir(parents=True, exist_ok=True)
    body, archive, models = out / "frame.bin", out / "model", out / "models"
    body.write_bytes(b"0123456789abcdef" * 4)
    archive.write_text("instant")
    shutil.rmtree(models, ignore_errors=True)
    models.mkdir()
    destination = Destination(str(out / str(frames)))
    job = Job(str(archive), False, FrameOptions(), 64, _open_instant)
    run = BulkRun(job, {"frames": frames, "names": args.names}, 500)
    setting = Setting("instant", body, "lidar", frames, 64, 500, args.processes, 1, "cpu")
    engine = engine_of(args.engine, setting)
    started = time.monotonic()
    finished = computed = 0
    peaks = _Peaks(models, args.processes)
    began = started
    with ExitStack() as stack:
        names = _NAMES[args.names]
        source = Source("invented names", None, False, (_CLIP,), (_invented(frames, str(body), names),))
        plan = plan_run(run, destination, lambda: source, stack, overwrite=False)
        listed_s = time.monotonic() - started
        finished = plan.frames_finished
        first = next(plan.missing(), None)
        packed = len(pack_lines(first.lines)) / len(first.lines) if first else 0.0

        def advance(count: int) -> None:
            nonlocal computed
            computed += count
            peaks.sample()

        signal.setitimer(signal.ITIMER_REAL, args.seconds)
        began = time.monotonic()
        with suppress(KeyboardInterrupt):
            execute(run, plan, destination, engine, advance)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {
        "finished": finished + computed,
        "coordinator": _peak_mib(os.getpid()),
        "process": peaks.process,
        "process_pss": peaks.process_pss,
        "beside_pss": peaks.beside_pss,
        "packed": packed,
        "listed_s": listed_s,
        "rate": computed / (time.monotonic() - began),
    }


class _Peaks:
    """Largest samples of memory, MiB: of one process that this one has started, and of all that have no model.

    Args:
        models: folder in which processes with a model leave their number.
        processes: how many will have one.
    """

    def __init__(self, models: Path, processes: int) -> None:
        self._models, self._processes = models, processes
        self._next = 0.0
        self.process = self.process_pss = self.beside_pss = 0.0

    def sample(self) -> None:
        """Read what the kernel has as peaks, and proportional memory twice a second at most: it costs 1 ms each."""
        direct = [child.pid for child in active_children()]
        self.process = max([self.process, *map(_peak_mib, direct)])
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + _SAMPLE_S
        with_model = {int(mark.name) for mark in self._models.iterdir()}
        here = psutil.Process()
        found = {each.pid: _pss_mib(each.pid) for each in (here, *here.children(recursive=True))}
        self.process_pss = max([self.process_pss, *(found.get(pid or 0, 0.0) for pid in direct)])
        if len(with_model) >= self._processes:  # until then, processes that will have one count as others
            beside = sum(mib for pid, mib in found.items() if pid not in with_model)
            self.beside_pss = max(self.beside_pss, beside)


def _peak_mib(process: int | None) -> float:
    """Read the peak of resident memory of a process; `ru_maxrss` of a child would begin with that of its parent."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has ended
        return 0.0
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found.group(1)) / 1024 if found else 0.0


def _pss_mib(process: int) -> float:
    """Read the proportional memory of a process: pages that several share count by their share."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0.0
    found = re.search(r"^Pss:\s*(\d+) kB", rollup, re.MULTILINE)
    return int(found.group(1)) / 1024 if found else 0.0


# Name of the k-th of so many frames; no two are the same.
_NAMES: dict[str, Callable[[int, int], str]] = {
    "counting": lambda k, frames: f"drive-{k * _STEP % frames:09d}.bin",
    "random": lambda k, frames: f"{k * _ODD % 2**128:032x}.bin",
}


def _invented(frames: int, body: str, name_of: Callable[[int, int], str]) -> Iterator[Frame]:
    """Invent names, sort them as those of a folder, and let all be one file."""
    names = (name_of(k, frames) for k in range(frames))
    for frame in sorted_frames(names, "/"):
        yield frame_at(frame.name, frame.stem, body, _CLIP)


def _open_instant(archive: Path, device: str, *, trust_code: bool, threads: int) -> _InstantModel:
    (archive.parent / "models" / str(os.getpid())).touch()
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
    parser.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[0], help="what computes (default: %(default)s)"
    )
    parser.add_argument(
        "--names",
        choices=tuple(_NAMES),
        default="counting",
        help="names of the frames: with numbers that count up, or 32 digits like a hash (default: %(default)s)",
    )
    parser.add_argument("--processes", type=count, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--seconds", type=bounded(float, 0.1), default=3600.0, help="stop each after so long (default: 3600)"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser
