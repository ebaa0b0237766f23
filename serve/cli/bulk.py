"""``mmdet3d-serve bulk``: predictions of many frames, on this machine or a Ray cluster, into parts of a folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import cast

from serve import archive, storage
from serve.bulk.destination import Destination
from serve.bulk.formats import FORMATS, Outputs, check_outputs
from serve.bulk.listing import list_frames
from serve.bulk.parts import Engine, Job
from serve.bulk.processes import LocalEngine
from serve.bulk.progress import Progress
from serve.bulk.ray_engine import RayEngine
from serve.bulk.retry import repeat_reading
from serve.bulk.run import BulkRun, Summary, execute, plan_run
from serve.cli.entry import (
    add_checkpoint_flags,
    add_format_flags,
    bounded,
    command_parser,
    open_cache,
    stage_reporter,
)
from serve.cli.serve import stoppable
from serve.errors import SettingsError
from serve.predict.loading import archive_of
from serve.predict.manifests import Manifest, copied, is_manifest, open_manifest
from serve.predict.sources import Source, of_manifest
from serve.protocol.frame_spec import Modality
from serve.protocol.options import FrameOptions
from serve.storage.hashes import sha256_of
from serve.worker.cpu_quota import available_cores

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Predict; returns 0, or 1 if frames failed."""
    args = _parser().parse_args(argv)
    outputs = _outputs(args)
    report = stage_reporter()
    with stoppable(), ExitStack() as stack:
        engine = _ray_engine(args) if args.engine == "ray" else None
        manifest = _manifest(args.source, stack)
        destination = Destination(args.out)
        stack.callback(destination.discard_empty)
        destination.check_inputs(args.source, args.model, args.checkpoint, args.calib, args.annotations)
        made = archive_of(
            args.model,
            args.checkpoint,
            allow_partial=args.allow_partial,
            trust_checkpoint=args.trust_checkpoint,
            classes=_classes(args.classes),
            report=report,
        )
        options = FrameOptions(
            score_thr=args.score_thr, max_detections=args.max_detections, columns=args.columns
        )
        run = BulkRun(
            Job(str(made.path), made.trust, options, args.batch_size, batch_cost=args.batch_cost),
            {
                **_source_identity(args.source, manifest),
                "model_sha256": sha256_of(made.path),
                "options": {name: value for name, value in asdict(options).items() if value},
            },
            args.part_frames,
            outputs,
            converters=max(1, available_cores() // 4),
        )
        engine = engine or _local_engine(args)
        metadata = archive.verify(made.path)
        report("listing the frames")
        plan = plan_run(
            run,
            destination,
            lambda: (
                _listed(manifest)
                if manifest is not None
                else list_frames(
                    args.source,
                    cast(Modality, metadata.modality),
                    cache=open_cache(),
                    report=lambda count: report(f"found {count:,} files"),
                )
            ),
            stack,
            overwrite=args.overwrite,
            retry_failed=args.retry_failed,
        )
        check_outputs(outputs, metadata.classes, archive.read_expected(made.path), plan.manifest, destination)
        report(
            f"{_frames(plan.frames)} in {plan.parts:,} parts of {plan.part_frames:,}, {len(plan.finished):,} finished"
        )
        try:
            with Progress(plan.frames, plan.frames_finished) as progress:
                summary = execute(run, plan, destination, engine, progress.advance)
        except BaseException:
            print("the same command goes on from the parts that are finished", file=sys.stderr, flush=True)
            raise
    _print(summary, destination)
    return 1 if summary.counts.failed or any(summary.unwritten.values()) else 0


def _print(summary: Summary, destination: Destination) -> None:
    counts = summary.counts
    rate = f", {summary.computed / summary.seconds:.1f} a second" if summary.computed else ""
    print(
        f"{_frames(counts.frames)} ({summary.computed:,} now{rate}), {counts.failed.total():,} failed "
        f"→ {destination.where}",
        file=sys.stderr,
    )
    for name, found in (("failed", counts.failed), ("warning", counts.warnings)):
        for code, count in found.most_common():
            print(f"{name}: {code}: {_frames(count)}", file=sys.stderr)
    for name, codes in summary.unwritten.items():
        for code, count in codes.most_common():
            print(f"not in {name}: {code}: {_frames(count)}", file=sys.stderr)
    for name, count in summary.partial.items():
        print(
            f"{name}: {count:,} parts, of a former run; --format with {name} writes the others",
            file=sys.stderr,
        )


def _frames(count: int) -> str:
    return f"{count:,} frame{'s' * (count != 1)}"


def _outputs(args: argparse.Namespace) -> Outputs:
    names = [name for text in args.format for name in text.split(",") if name]
    if unknown := [name for name in names if name not in FORMATS]:
        raise SettingsError(f"unknown format {unknown[0]!r}; choose of {', '.join(FORMATS)}")
    return Outputs(
        tuple(dict.fromkeys(("jsonl", *names))),
        args.calib and _named(args.calib),
        args.image_size,
        args.annotations,
    )


def _manifest(source: str, stack: ExitStack) -> Manifest | None:
    """Open the source if it is a manifest; paths on standard input are relative to the working folder."""
    if source != "-":
        return repeat_reading(lambda: open_manifest(source)) if is_manifest(source) else None
    path = stack.enter_context(copied(sys.stdin.buffer))
    return open_manifest(
        str(path), storage.Location("file", os.path.join(os.getcwd(), "-")), what="standard input"
    )


def _listed(manifest: Manifest) -> Source:
    manifest.check()
    return of_manifest(manifest)


def _source_identity(source: str, manifest: Manifest | None) -> dict[str, str]:
    named = {"source": _named(source)}
    return named if manifest is None else {**named, "list_sha256": manifest.sha256()}


def _named(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def _classes(text: str | None) -> tuple[str, ...]:
    if not text:
        return ()
    from serve.convert.classes import read_class_names

    return tuple(read_class_names(text))


def _local_engine(args: argparse.Namespace) -> Engine:
    devices = _devices(args.device, args.processes)
    return LocalEngine(devices, threads=max(1, available_cores() // len(devices)))


def _ray_engine(args: argparse.Namespace) -> Engine:
    is_there = storage.is_remote(args.model) and args.model.lower().endswith(".mar")
    return RayEngine(
        args.ray_address,
        device=args.device,
        actors=args.processes,
        archive_uri=args.model if is_there else None,
    )


def _devices(device: str | None, processes: int | None) -> tuple[str, ...]:
    """One process per GPU, or on the CPU as many as there are cores: that is how they answer most frames."""
    import torch

    if device is None and torch.cuda.is_available():
        names = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
        return tuple(names * (processes or 1))
    if device is not None and device != "cpu":
        return (device,) * (processes or 1)
    return ("cpu",) * (processes or available_cores())


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "bulk",
        "Predict many frames on all cores or GPUs of this machine, or of a Ray cluster, and write one line of JSON per "
        "frame into parts of a folder or bucket. Stopped by Ctrl-C or killed at any moment, the same command goes on "
        "with the parts that are missing. Exit status: 0 all frames predicted, 1 some failed, 2 error, 130 stopped.",
        [
            "bulk velodyne/ --model second.mar --out results",
            "bulk s3://bucket/drive-17/ --model second --out s3://bucket/results/drive-17",
            "bulk frames.ffr --model my_config.py --checkpoint my.pth --out results --processes 2",
            "bulk s3://bucket/drive-17/ --model s3://bucket/second.mar --out s3://bucket/results --engine ray",
        ],
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder, pattern in quotes ('*.jpg'), s3://bucket/prefix, packed file, or manifest (.txt, .jsonl; - for "
        "standard input): a list of paths or URIs; frames of several parts are folders with one file per part",
    )
    parser.add_argument("--model", required=True, help="archive (.mar), config, or name of the zoo")
    parser.add_argument("--checkpoint", help="path or URI of a checkpoint in place of the zoo's weights")
    parser.add_argument(
        "--out", required=True, metavar="DEST", help="folder or s3://bucket/prefix of the results"
    )
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        metavar="A,B",
        help=f"{', '.join(FORMATS)}; the lines of JSON are always written (default: jsonl)",
    )
    add_format_flags(parser)
    parser.add_argument(
        "--part-frames",
        type=bounded(int, 1, 100_000),
        default=500,
        metavar="N",
        help="frames per part: what a kill costs at most, per process (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=bounded(int, 1, 256),
        default=8,
        metavar="N",
        help="most frames in a batch; frames share one as in the gateway, by cost and sizes of their images (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--batch-cost",
        type=bounded(int, 1),
        metavar="N",
        help="most points, or pixels, in a batch (default: 2 million points, 64 million pixels)",
    )
    parser.add_argument(
        "--processes",
        type=bounded(int, 1, 256),
        metavar="N",
        help="processes, of a GPU each so many (default: one per core, or one per GPU); of --engine ray the most "
        "actors in all",
    )
    parser.add_argument(
        "--device", help="cpu or cuda:N (default: all GPUs if available); cpu or cuda of --engine ray"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine, or Ray Data on a cluster (default: %(default)s); the results are the same",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="head of a Ray cluster, or auto for this machine's (default: RAY_ADDRESS, else a Ray for this run alone)",
    )
    parser.add_argument(
        "--score-thr", type=bounded(float, 0, 1), default=0.0, metavar="SCORE", help="lowest score, 0 to 1"
    )
    parser.add_argument(
        "--max-detections", type=bounded(int, 0), metavar="N", help="keep the N best of a frame"
    )
    parser.add_argument("--columns", help="columns of the point clouds, as in x,y,z,intensity=0")
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="compute the parts again that have failed frames, such as those of a bucket that did not answer",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove the results that --out has, of any run, and begin anew",
    )
    add_checkpoint_flags(parser)
    return parser
