"""``mmdet3d-serve compare``: what changes from one version of a model to another, on the same frames."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import orjson
from tqdm import tqdm

from serve.cli.entry import bounded, command_parser, open_cache, stage_reporter
from serve.cli.serve import stoppable
from serve.compare.changes import ChangeRules
from serve.errors import ServeError, SettingsError
from serve.predict.loading import load_model
from serve.predict.models import LocalModel, RemoteModel, connect
from serve.predict.sources import open_source
from serve.predict.writers import Drawing
from serve.rollout.comparison import FrameChanges, compare_models
from serve.rollout.report import Thresholds, draw_changes, json_line, table, violations
from serve.storage.uri import redact_url
from serve.verify.endpoint import read_token

__all__ = ["main"]

_SERVED = re.compile(
    r"(?P<url>https?://[^/]+(?:/.*?)?)/predictions/(?P<name>[^/]+)(?:/(?P<version>[^/]+))?/?"
)


def main(argv: Sequence[str] | None) -> int:
    """Compare; returns 0, 1 beyond a limit, 3 if there was nothing to compare."""
    args = _parser().parse_args(argv)
    rules = ChangeRules(args.score_thr, args.low_score, args.distance_m, args.iou)
    limits = Thresholds(
        args.max_lost,
        args.max_new,
        args.max_renamed,
        args.max_score_shift,
        args.max_moved_m,
        args.max_iou_loss,
    )
    report = stage_reporter()
    with stoppable(), ExitStack() as stack:
        if args.out is not None:
            _make_folder(args.out)
        report(f"opening {_shown(args.before)}")
        before = _open(args.before, args)
        stack.callback(before.close)
        report(f"opening {_shown(args.after)}")
        after = _open(args.after, args)
        stack.callback(after.close)
        if None not in (before.modality, after.modality) and before.modality != after.modality:
            raise SettingsError(
                f"{_shown(args.before)} takes frames of the kind {before.modality}, {_shown(args.after)} of the kind "
                f"{after.modality}; compare versions of one model"
            )
        source = open_source(args.source, before.modality or after.modality, cache=open_cache())
        bar = stack.enter_context(tqdm(total=source.count, unit="frame", disable=None, leave=False))
        lines = stack.enter_context((args.out / "frames.jsonl").open("wb")) if args.out is not None else None

        def observe(found: FrameChanges) -> None:
            bar.update()
            if lines is not None:
                lines.write(orjson.dumps(found.record()) + b"\n")

        found = compare_models(
            source,
            before,
            after,
            rules,
            columns=args.columns,
            batch_size=args.batch_size,
            keep_worst=args.worst if args.out is not None else 0,
            observe=observe,
        )
        bar.close()
        report(f"compared {found.frames} frames")
        seen = violations(found, limits)
        line = json_line(
            found, seen, before=_shown(args.before), after=_shown(args.after), source=source.what
        )
        if args.out is not None:
            (args.out / "comparison.json").write_text(line + "\n", encoding="utf-8")
            _draw(found.worst, args.out / "worst", before.load_dim)
    print(table(found))
    print(line)
    for text in seen:
        print(f"beyond the limit: {text}", file=sys.stderr)
    failed = found.failed_before + found.failed_after + found.failed_both
    if failed:
        print(
            f"note: {failed} frames failed: {found.failed_before} in the first version alone, {found.failed_after} in "
            f"the second alone, {found.failed_both} in both",
            file=sys.stderr,
        )
    if seen:
        return 1
    if not found.frames:
        print("note: no frame has answers of both versions, so that nothing is compared", file=sys.stderr)
        return 3
    if not found.total.counts.total():
        print(
            f"note: no detection of at least {rules.score_thr:g} in {found.frames} frames, so that nothing is "
            "compared; lower --score-thr or send other frames",
            file=sys.stderr,
        )
        return 3
    return 0


def _open(text: str, args: argparse.Namespace) -> LocalModel | RemoteModel:
    """Open what A or B names: a served model by the address of its predictions, or a model in this process."""
    if text.startswith(("http://", "https://")):
        found = _SERVED.fullmatch(text)
        if found is None:
            raise SettingsError(
                f"{_shown(text)} names no served model; give http://HOST:8000/predictions/NAME or …/NAME/VERSION"
            )
        return connect(
            found["url"],
            found["name"],
            found["version"],
            token=read_token(args.token_file) if args.token_file else None,
            timeout_s=args.timeout_s,
            connections=args.batch_size,
        )
    return load_model(text, device=args.device)


def _shown(text: str) -> str:
    """Return what A or B names, without a password in an address."""
    return redact_url(text) if text.startswith(("http://", "https://")) else text


def _make_folder(out: Path) -> None:
    try:
        (out / "worst").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out} cannot be made: {error.strerror}") from error
    # Of a former comparison: this one may be stopped before it has written its own.
    for old in (*(out / "worst").glob("*.png"), out / "comparison.json"):
        old.unlink(missing_ok=True)


def _draw(worst: Sequence[FrameChanges], folder: Path, load_dim: int | None) -> None:
    for found in worst:
        try:
            print(f"picture: {draw_changes(found, folder, Drawing(load_dim=load_dim))}", file=sys.stderr)
        except ServeError as error:
            print(f"note: no picture of {found.frame.name}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "compare",
        "Ask two versions of a model for the same frames, and count the detections that are kept, lost, new and "
        "renamed, by class, score and distance. Prints a table and one line of JSON. Exit status: 0 within the limits, "
        "1 beyond one, 2 error, 3 no detections to compare, 130 stopped.",
        [
            "compare second-1.0.mar second-2.0.mar velodyne/ --out changes",
            "compare http://HOST:8000/predictions/second/1.0 http://HOST:8000/predictions/second/2.0 velodyne/",
            "compare http://HOST:8000/predictions/faster-rcnn new.mar s3://bucket/val --max-lost 0.01",
        ],
    )
    named = (
        "address of a served model's predictions (http://HOST:8000/predictions/NAME[/VERSION]), or path or URI of an "
        "archive"
    )
    parser.add_argument("before", metavar="A", help=f"first version: {named}")
    parser.add_argument("after", metavar="B", help="second version, named alike")
    parser.add_argument("source", metavar="FRAMES", help="what predict takes: folder, pattern, video, s3://…")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write comparison.json, frames.jsonl and pictures of the worst frames",
    )
    parser.add_argument(
        "--worst", type=bounded(int, 0), default=5, metavar="N", help="frames to draw (default: %(default)s)"
    )
    defaults, limits = ChangeRules(), Thresholds()
    parser.add_argument(
        "--score-thr",
        type=bounded(float, 0, 1),
        default=defaults.score_thr,
        metavar="SCORE",
        help="score from which a detection counts (default: %(default)g)",
    )
    parser.add_argument(
        "--low-score",
        type=bounded(float, 0, 1),
        metavar="SCORE",
        help="least score of its partner in the other version (default: half of --score-thr)",
    )
    parser.add_argument(
        "--distance-m",
        type=bounded(float, 1e-3, unit="metres"),
        default=defaults.distance_m,
        metavar="M",
        help="largest distance of paired 3D boxes on the ground, metres (default: %(default)g)",
    )
    parser.add_argument(
        "--iou",
        type=bounded(float, 1e-3, 1),
        default=defaults.iou,
        help="least IoU of paired 2D boxes (default: %(default)g)",
    )
    for name, value, what in (
        ("lost", limits.lost, "of the first version's detections that the second lacks"),
        ("new", limits.new, "of detections that only the second has"),
        ("renamed", limits.renamed, "of detections that have another class"),
    ):
        parser.add_argument(
            f"--max-{name}",
            type=bounded(float, 0),
            default=value,
            metavar="SHARE",
            help=f"largest share {what}, over all and of each class (default: %(default)g)",
        )
    parser.add_argument(
        "--max-score-shift",
        type=bounded(float, 0),
        default=limits.score_shift,
        metavar="SCORE",
        help="largest mean shift of scores (default: %(default)g)",
    )
    parser.add_argument(
        "--max-moved-m",
        type=bounded(float, 0, unit="metres"),
        default=limits.moved_m,
        metavar="M",
        help="largest mean distance of paired 3D boxes, metres (default: %(default)g)",
    )
    parser.add_argument(
        "--max-iou-loss",
        type=bounded(float, 0, 1),
        default=limits.iou_loss,
        metavar="LOSS",
        help="largest mean of 1 - IoU of paired 2D boxes (default: %(default)g)",
    )
    parser.add_argument(
        "--batch-size",
        type=bounded(int, 1, 256),
        default=1,
        metavar="N",
        help="frames per batch; of a server requests at a time (default: %(default)s)",
    )
    parser.add_argument("--columns", help="columns of the point clouds, as in x,y,z,intensity=0")
    parser.add_argument("--device", help="cpu or cuda:N, of archives (default: cuda:0 if available)")
    parser.add_argument("--token-file", help="file with the servers' token or API key")
    parser.add_argument(
        "--timeout-s",
        type=bounded(float, 0.001, unit="seconds"),
        default=120.0,
        help="timeout of a request, seconds (default: %(default)g)",
    )
    return parser
