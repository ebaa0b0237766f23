"""``python -m tools.bench bulk``: a run over many frames beside the runtime alone, in pairs.

Both sides get the same frames, archive, size of batches, processes and threads; their start-up is timed apart. The side
that comes first alternates. Prints a row per pair, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from serve import archive
from serve.cli.entry import bounded
from serve.protocol.frame_spec import Modality
from serve.worker.cpu_quota import available_cores
from tools.bench.bulk import SLEEP, Setting, bulk_rate, runtime_rate

__all__ = ["main"]

_WANTED = 0.95


def main(argv: Sequence[str] | None) -> int:
    """Measure and print; 1 if the median share of the runtime's rate is below 0.95."""
    args = _parser().parse_args(argv)
    processes = args.processes or available_cores()
    setting = Setting(
        archive=args.archive,
        frame=args.frame,
        modality="lidar"
        if args.archive == SLEEP
        else cast(Modality, archive.verify(Path(args.archive)).modality),
        frames=args.frames,
        batch_size=args.batch_size,
        part_frames=args.part_frames or max(1, args.frames // (2 * processes)),
        processes=processes,
        threads=max(1, available_cores() // processes),
        device=args.device,
    )
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench bulk", description=__doc__)
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
    return parser
