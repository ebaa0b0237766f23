"""``python -m tools.bench bulk``: a run over many frames beside the runtime alone, in pairs.

Both sides get the same frames, archive, size of batches, processes and threads; their start-up is timed apart. The side
that comes first alternates. Prints a row per pair, then one line of JSON.

With ``--engines local,ray`` the sides are the engines of bulk, by turns in one run: frames/s, seconds until all models
are ready, until the first part is finished and to end, and peaks of memory in MiB for growing numbers of invented
frames. Both get one thread per process, and parts are smaller (default: four for each process, of whole batches).
Needs Ray: ``make bench NAME=bulk WITH=ray``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from serve import archive
from serve.cli.entry import bounded
from serve.cli.serve import stoppable
from serve.errors import SettingsError
from serve.protocol.frame_spec import Modality
from serve.worker.cpu_quota import available_cores
from tools.bench.bulk import ENGINES, SLEEP, Setting, bulk_rate, runtime_rate
from tools.bench.pages import split_page

__all__ = ["main"]

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "benchmarks" / "bulk.md"
_WANTED = 0.95
_PARTS = 4  # for each process
_LEAST_PARTS = 2  # Ray hands an actor so many ahead, and each waits for the others to have their models


def main(argv: Sequence[str] | None) -> int:
    """Measure and print; 1 if the median share of the runtime's rate is below 0.95."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.write_docs and not args.engines:
        parser.error("--write-docs is for --engines")
    if not args.frame.is_file():
        parser.error(f"{args.frame} is no file")
    processes = args.processes or available_cores()
    if args.engines:
        if processes > available_cores():
            parser.error(f"--engines: Ray has an actor per core, {available_cores()} here")
        return _compare_engines(args, processes)
    setting = _setting(args, processes, args.part_frames or max(1, args.frames // (2 * processes)))
    print(
        f"{Path(args.archive).name}, {args.frame.name}: {setting.frames} frames, {processes} processes of "
        f"{setting.threads} threads on {args.device}, batches of {setting.batch_size}, parts of {setting.part_frames}"
    )
    print(
        "| pair | runtime alone, frames/s | bulk, frames/s | share | CPU, ms/frame | bulk | start-up, s | bulk |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    shares, rows = [], []
    for pair in range(args.pairs):
        if pair % 2:
            bulk, alone = bulk_rate(setting, args.out), runtime_rate(setting)
        else:
            alone, bulk = runtime_rate(setting), bulk_rate(setting, args.out)
        shares.append(bulk.rate / alone.rate)
        rows.append([asdict(alone), asdict(bulk)])
        print(
            f"| {pair + 1} | {alone.rate:.2f} | {bulk.rate:.2f} | {shares[-1]:.3f} "
            f"| {1e3 * alone.cpu_s:.2f} | {1e3 * bulk.cpu_s:.2f} | {alone.startup_s:.1f} | {bulk.startup_s:.1f} |",
            flush=True,
        )
    median = statistics.median(shares)
    print(f"median share {median:.3f}")
    print(json.dumps({"bulk": {"archive": Path(args.archive).name, "share": median, "rows": rows}}))
    if median < _WANTED:
        print(f"error: below {_WANTED} of the runtime's rate", file=sys.stderr)
    return int(median < _WANTED)


def _compare_engines(args: argparse.Namespace, processes: int) -> int:
    from tools.bench.bulk_engines import compare_engines

    batches = -(-args.frames // (_PARTS * processes * args.batch_size))
    setting = replace(_setting(args, processes, args.part_frames or batches * args.batch_size), threads=1)
    if (parts := -(-setting.frames // setting.part_frames)) < _LEAST_PARTS * processes:
        raise SettingsError(
            f"{setting.frames} frames are {parts} parts of {setting.part_frames}, and {processes} processes need "
            f"{_LEAST_PARTS * processes}, so that each gets one; raise --frames or lower --part-frames"
        )
    if args.write_docs:
        try:
            split_page(PAGE, Path(args.archive).stem)  # fails now, not after minutes
        except ValueError as error:
            raise SettingsError(str(error)) from error
    with stoppable():
        report = compare_engines(setting, args.engines, args.pairs, args.memory_frames, args.out)
    print("\n".join([*report.conclusions(), f"{report.workload}; {report.machine}"]))
    if args.write_docs:
        report.write_page(PAGE)
        print(f"wrote {PAGE.relative_to(ROOT)}")
    print(report.json_line(), flush=True)
    return 0


def _setting(args: argparse.Namespace, processes: int, part_frames: int) -> Setting:
    return Setting(
        archive=args.archive,
        frame=args.frame,
        modality="lidar"
        if args.archive == SLEEP
        else cast(Modality, archive.verify(Path(args.archive)).modality),
        frames=args.frames,
        batch_size=args.batch_size,
        part_frames=part_frames,
        processes=processes,
        threads=max(1, available_cores() // processes),
        device=args.device,
    )


def _engines(text: str) -> list[str]:
    """Read the names of engines, of which the local one is what the others are compared with."""
    names = text.split(",")
    if sorted(names) != sorted(ENGINES):
        raise argparse.ArgumentTypeError(
            f"must be {','.join(ENGINES)} or {','.join(ENGINES[::-1])}, got {text!r}"
        )
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench bulk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "archive",
        help=f"archive, FILE.mar; {SLEEP}: a model that takes 20 ms for a batch and 2 ms for each frame",
    )
    parser.add_argument("frame", type=Path, help="file with one frame, which they get again and again")
    count = bounded(int, 1)
    parser.add_argument("--frames", type=count, default=128, help="frames of a measurement (default: 128)")
    parser.add_argument("--pairs", type=count, default=3, help="pairs of measurements (default: 3)")
    parser.add_argument("--processes", type=count, help="processes (default: one per core)")
    parser.add_argument("--batch-size", type=count, default=8, help="frames per batch (default: 8)")
    parser.add_argument(
        "--part-frames", type=count, help="frames per part (default: two parts for each process)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    parser.add_argument("--out", help="s3://bucket/prefix for the results (default: a temporary folder)")
    parser.add_argument(
        "--engines",
        type=_engines,
        metavar="local,ray",
        help="compare the engines instead of the runtime; the first begins the first pair",
    )
    parser.add_argument(
        "--memory-frames",
        nargs="*",
        type=count,
        default=[100_000, 1_000_000],
        metavar="N",
        help="with --engines: numbers of invented frames, with random names and a model that answers at once, for "
        "which peaks of memory are measured; none to leave that out (default: 100000 1000000)",
    )
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="with --engines: update the part of docs/benchmarks/bulk.md that has the archive's name",
    )
    return parser
