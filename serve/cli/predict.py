"""``mmdet3d-serve predict``: detections of images, clouds, videos, cameras and buckets, without or through a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from serve.cli.entry import (
    add_checkpoint_flags,
    add_format_flags,
    bounded,
    command_parser,
    open_cache,
    stage_reporter,
)
from serve.cli.serve import stoppable
from serve.errors import ServeError, SettingsError
from serve.predict.frames import Prediction
from serve.predict.loading import load_model
from serve.predict.models import LocalModel, RemoteModel, connect
from serve.predict.run import FORMATS, Run, Summary, formats_of, run
from serve.predict.sources import Source, check_exists, open_source
from serve.predict.writers import PICTURE_SCORE_THR
from serve.protocol.options import FrameOptions
from serve.tracking import TrackOptions
from serve.verify.endpoint import read_token

__all__ = ["main"]

_DEFAULT_FOLDER = Path("predictions")
_SHOWN_FAILURES = 10


def main(argv: Sequence[str] | None) -> int:
    """Predict; returns 0, or 1 if frames failed."""
    args = _parser().parse_args(argv)
    formats, tracks = _formats(args.format), _tracks(args)
    check_exists(args.source)
    with stoppable(), _model(args) as model:
        source = open_source(args.source, model.modality, cache=open_cache(), topic=args.topic)
        out = args.out
        if out is None and not formats and source.count != 1:
            out = _DEFAULT_FOLDER
        task = Run(
            source,
            model,
            out,
            formats_of(
                out,
                formats,
                source.count if args.max_frames is None else min(source.count or 2, args.max_frames),
            ),
            options=FrameOptions(
                score_thr=args.score_thr or 0.0, max_detections=args.max_detections, columns=args.columns
            ),
            drawn_score_thr=PICTURE_SCORE_THR if args.score_thr is None else args.score_thr,
            only=tuple(name.strip() for name in args.only.split(",") if name.strip()),
            batch_size=args.batch_size,
            max_frames=args.max_frames,
            calibration=args.calib,
            image_size=args.image_size,
            annotations=args.annotations,
            rate=args.fps,
            overwrite=args.overwrite,
            tracks=tracks,
        )
        return _run(task, source)


def _run(task: Run, source: Source) -> int:
    count = source.count if task.max_frames is None else min(source.count or task.max_frames, task.max_frames)
    done = 0
    bar = tqdm(
        total=count, unit="frame", disable=True if count == 1 else None, dynamic_ncols=True, smoothing=0.1
    )

    def progress(prediction: Prediction) -> None:
        nonlocal done
        done += 1
        if prediction.is_new:
            bar.update()
        elif not bar.disable:  # not counted in the rate
            bar.initial += 1
            bar.n += 1

    try:
        with bar:
            summary = run(task, progress=progress)
    except (KeyboardInterrupt, ServeError):
        if done and task.out is not None and not source.live:
            total = "" if count is None else f" of {count}"
            print(
                f"{done}{total} frames are finished; the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        raise
    _print_summary(summary, task)
    return 1 if summary.failed else 0


def _print_summary(summary: Summary, task: Run) -> None:
    """Print what happened to stderr; standard output is for predictions."""
    for (code, message), count in sorted(summary.warnings.items()):
        print(f"warning: {code}: {message} ({count} {_frames(count)})", file=sys.stderr)
    for name, error in summary.failed[:_SHOWN_FAILURES]:
        print(f"failed: {name}: {error}", file=sys.stderr)
    if len(summary.failed) > _SHOWN_FAILURES:
        print(f"… and {len(summary.failed) - _SHOWN_FAILURES} more failed", file=sys.stderr)
    if task.out is None and not summary.failed:
        return
    parts = [f"{summary.predicted} {_frames(summary.predicted)} predicted"]
    if summary.kept:
        parts.append(f"{summary.kept} kept from before")
    if summary.failed:
        parts.append(f"{len(summary.failed)} failed")
    written = ", ".join(map(str, dict.fromkeys(summary.written)))
    print(f"{', '.join(parts)}{f' → {written}' if written else ''}", file=sys.stderr, flush=True)


def _frames(count: int) -> str:
    return "frame" if count == 1 else "frames"


def _model(args: argparse.Namespace) -> LocalModel | RemoteModel:
    if args.url is not None:
        for name in ("checkpoint", "device", "classes"):
            if getattr(args, name) is not None:
                raise SettingsError(
                    f"--{name} is for a model in this process; leave it out, or leave out --url"
                )
        name, _, version = args.model.partition(":")
        return connect(
            args.url,
            name,
            version or None,
            token=read_token(args.token_file) if args.token_file else None,
            timeout_s=args.timeout_s,
            connections=args.batch_size,
        )
    from serve.convert.classes import read_class_names  # imports torch, which a client does without

    return load_model(
        args.model,
        args.checkpoint,
        device=args.device,
        random_weights=args.random_weights,
        classes=read_class_names(args.classes) if args.classes else (),
        allow_partial=args.allow_partial,
        trust_checkpoint=args.trust_checkpoint,
        report=stage_reporter(),
    )


def _tracks(args: argparse.Namespace) -> TrackOptions | None:
    given = {
        field: getattr(args, flag)
        for flag, field in (
            ("track_score", "min_score"),
            ("track_hits", "min_hits"),
            ("track_age_s", "max_age_s"),
        )
        if getattr(args, flag) is not None
    }
    if not args.track:
        if given:
            raise SettingsError(
                "--track-score, --track-hits and --track-age-s are rules of --track; add --track"
            )
        return None
    rules = TrackOptions(**given)
    return replace(rules, low_score=min(rules.low_score, rules.min_score))


def _formats(given: Sequence[str]) -> tuple[str, ...]:
    names = [name for text in given for name in text.split(",") if name]
    if unknown := [name for name in names if name not in FORMATS]:
        raise SettingsError(f"unknown format {unknown[0]!r}; choose of {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(names))


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"must be frames per second, such as 10 or 30000/1001, got {text!r}")
    return rate.limit_denominator(1001)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "predict",
        "Predict the frames of a source, in this process or through a server, and write JSON, tables, labels, pictures "
        "or videos. Stopped by Ctrl-C or killed, the same command goes on where it was. Exit status: 0 all frames "
        "predicted, 1 some failed, 2 error, 130 stopped.",
        [
            "predict street.jpg --model faster-rcnn --out street.png",
            "predict drive.mp4 --model my_config.py --checkpoint my.pth --out seen.mp4 --score-thr 0.5",
            "predict velodyne/ --model second --out seen --format kitti,picture --calib calib --image-size 1242x375",
            "predict s3://bucket/frames --model second --url http://127.0.0.1:8000 --batch-size 8 --out seen.csv",
            "predict 0 --model rtmdet --format video --out camera",
            "predict velodyne/ --model second --track --format jsonl,video --out seen",
        ],
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="image, point cloud or video; folder; pattern in quotes ('*.jpg'); number of a camera; URL of a stream; "
        "recording (.bag, .mcap, folder of a ROS 2 bag); s3://bucket/prefix; "
        "packed file (ffrecord:///packed.ffr#folder); frames of several parts are folders with one "
        "file per part",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="archive (.mar), config, or name of the zoo; with --url NAME or NAME:VERSION of a served model",
    )
    parser.add_argument("--checkpoint", help="path or URI of a checkpoint in place of the zoo's weights")
    parser.add_argument(
        "--url", metavar="URL", help="server, http://HOST:8000 (gateway) or http://HOST:8080 (TorchServe)"
    )
    parser.add_argument("--device", help="cpu or cuda:N (default: cuda:0 if available)")
    parser.add_argument(
        "--score-thr",
        type=bounded(float, 0, 1),
        metavar="SCORE",
        help=f"lowest score, 0 to 1 (default: {PICTURE_SCORE_THR:g} in pictures and videos, else all)",
    )
    parser.add_argument("--only", default="", metavar="A,B", help="keep detections of these classes only")
    parser.add_argument(
        "--max-detections", type=bounded(int, 0), metavar="N", help="keep the N best of a frame"
    )
    parser.add_argument(
        "--batch-size",
        type=bounded(int, 1, 256),
        default=1,
        metavar="N",
        help="frames per batch; with --url requests at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="folder, or one file whose name says the format: .jsonl, .csv, .json, .txt, .png, .jpg, .mp4, .mcap, "
        f".rrd, … (default: standard output for one frame, else ./{_DEFAULT_FOLDER})",
    )
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        metavar="A,B",
        help=f"{', '.join(FORMATS)} (default: json, or by the name of --out)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what --out has of this or another run"
    )
    parser.add_argument("--max-frames", type=bounded(int, 1), metavar="N", help="stop after N frames")
    add_format_flags(parser)
    parser.add_argument(
        "--fps",
        type=_rate,
        default=Fraction(10),
        metavar="RATE",
        help="frames per second of a video of images or clouds (default: %(default)s)",
    )
    parser.add_argument(
        "--topic", metavar="NAME", help="topic of a recording (default: the only one of such messages)"
    )
    rules = TrackOptions()
    parser.add_argument(
        "--track",
        action="store_true",
        help="give each object of a sequence an id (track_ids): of a folder, video, camera or recording",
    )
    parser.add_argument(
        "--track-score",
        type=bounded(float, 0, 1),
        metavar="SCORE",
        help=f"lowest score of a detection that starts a track (default: {rules.min_score:g})",
    )
    parser.add_argument(
        "--track-hits",
        type=bounded(int, 1),
        metavar="N",
        help=f"detections until a track has an id (default: {rules.min_hits})",
    )
    parser.add_argument(
        "--track-age-s",
        type=bounded(float, 0, unit="seconds"),
        metavar="S",
        help="how long an object may be unseen and keep its id, seconds "
        f"(default: {rules.max_age_s:g}); frames without times come at --fps",
    )
    parser.add_argument("--columns", help="columns of the point clouds, as in x,y,z,intensity=0")
    parser.add_argument(
        "--random-weights", action="store_true", help="try a model without weights; finds nothing real"
    )
    add_checkpoint_flags(parser)
    parser.add_argument("--token-file", help="file with the server's token or API key")
    parser.add_argument(
        "--timeout-s",
        type=bounded(float, 0.001, unit="seconds"),
        default=120.0,
        help="timeout of a request, seconds (default: %(default)g)",
    )
    return parser
