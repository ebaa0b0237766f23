"""``mmdet3d-serve reference``: what a model sees on given frames, recorded in its archive, or copied to another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from serve import archive
from serve.cli.entry import bounded, command_parser, open_cache, stage_reporter
from serve.cli.serve import stoppable
from serve.errors import ArchiveError, SettingsError, quote
from serve.predict.models import open_archive
from serve.predict.observed import count_source
from serve.predict.sources import open_source
from serve.storage.uri import redact_url
from serve.watch.reference import WINDOW_FRAMES, Recording, Reference, reference_of
from serve.watch.statistics import CLASS, SCORE_THR, SEGMENT

__all__ = ["main"]

# With fewer frames the limits are wide.
_FEW_FRAMES = 200
# Options of recording, of which a copy has no use.
_OF_FRAMES = ("score_thr", "window_frames", "batch_size", "columns", "device")


def main(argv: Sequence[str] | None) -> int:
    """Record a reference or copy one; returns 0, 3 if no frame could be predicted."""
    parser = _parser()
    args = parser.parse_args(argv)
    for path in (args.archive, args.copied_from):
        if path is not None and not path.is_file():
            raise SettingsError(f"{path} is no file; give the path of an archive (.mar)")
    if (args.source is None) == (args.copied_from is None):
        parser.error("give either FRAMES or --from ARCHIVE")
    if args.copied_from is not None:
        if odd := [name for name in _OF_FRAMES if getattr(args, name) != parser.get_default(name)]:
            parser.error(f"--{odd[0].replace('_', '-')} is for FRAMES; --from takes what was recorded")
        with stoppable():
            return _copy(args.copied_from, args.archive, args.out or args.archive)
    report = stage_reporter()
    with stoppable():
        report(f"loading {args.archive.name}")
        failed = 0

        def count_failure(name: str, error: Exception) -> None:
            nonlocal failed
            failed += 1
            print(f"note: {name} is left out: {error}", file=sys.stderr)

        with open_archive(args.archive, args.device) as model:
            source = open_source(args.source, model.modality, cache=open_cache())
            with tqdm(total=source.count, unit="frame", disable=None, leave=False) as bar:
                counts = count_source(
                    source,
                    model,
                    score_thr=args.score_thr,
                    columns=args.columns,
                    batch_size=args.batch_size,
                    failed=count_failure,
                    advance=bar.update,
                )
        if not counts:
            print(f"error: none of the {failed} frames could be predicted", file=sys.stderr)
            return 3
        report("writing the archive")
        recording = Recording(
            datetime.now(UTC).isoformat(timespec="seconds"), _without_secrets(args.source), args.window_frames
        )
        found = reference_of(counts, args.score_thr, args.window_frames, recording)
        target = args.out or args.archive
        sha256 = archive.record_statistics(args.archive, target, found)
    print(_table(found))
    print(f"archive   {target}")
    print(f"sha256    {sha256}")
    if len(counts) < _FEW_FRAMES:
        print(
            f"note      too few frames for narrow limits ({len(counts)}, of at least {_FEW_FRAMES}); take some "
            "hundred of all kinds that the model is to see"
        )
    return 0


def _copy(source: Path, path: Path, target: Path) -> int:
    """Write an archive again with the reference of another one, if the figures of both can be compared."""
    found = archive.read_statistics(source)
    if found is None:
        raise ArchiveError(
            f"{source} has no reference; record one with: mmdet3d-serve reference {source} FRAMES"
        )
    former, model = archive.verify(source), archive.verify(path)
    differences = [
        f"{name} {theirs} there, {ours} here"
        for name, theirs, ours in (
            ("modality", former.modality, model.modality),
            ("box_type_3d", former.box_type_3d, model.box_type_3d),
            ("further classes", _only(former.classes, model.classes), _only(model.classes, former.classes)),
        )
        if theirs != ours
    ]
    if differences:
        raise ArchiveError(
            f"the reference of {source} does not fit {path}: {'; '.join(differences)}; "
            f"record one with: mmdet3d-serve reference {path} FRAMES"
        )
    sha256 = archive.record_statistics(path, target, found)
    print(_table(found))
    print(f"of        {source} ({former.name} {former.version})")
    print(f"archive   {target} ({model.name} {model.version})")
    print(f"sha256    {sha256}")
    return 0


def _printable(text: str) -> str:
    """Return a text of an archive as a terminal may show it."""
    return text if text.isprintable() else quote(text)


def _without_secrets(source: str) -> str:
    """Return the source as an archive may show it: an address without what may be a password or a token."""
    is_address = "://" in source and not source.startswith(
        ("file:", "lmdb:", "ffrecord:")
    )  # their # is a name
    return redact_url(source) if is_address else source


def _only(classes: Sequence[str], others: Sequence[str]) -> str:
    """Return the classes that the others lack; their order is of no account, because they are counted by name."""
    return ", ".join(quote(name) for name in classes if name not in others) or "none"


def _table(found: Reference) -> str:
    """Return a row of each statistic with values: number, mean if its sum is known, and limit."""
    lines = [
        f"{found.counts.frames} frames, detections from a score of {found.score_thr:g} on",
        f"{'statistic':<16} {'values':>9} {'mean':>10} {'limit':>7}",
    ]
    sums = found.counts.sums  # not in the archive, so that a copy has none
    for name, limit in found.limits.items():
        number = int(found.counts.of(name).sum())
        mean = f"{sums[name] / number:.4g}" if name in sums else ""
        lines.append(f"{name:<16} {number:>9} {mean:>10} {limit:>7.3f}")
    if found.counts.of(CLASS).any():
        numbers = found.counts.by_class(CLASS)
        lines.append(
            "classes   " + ", ".join(f"{number} {_printable(name)}" for name, number in numbers.items())
        )
    if total := int(found.counts.of(SEGMENT).sum()):
        numbers = found.counts.by_class(SEGMENT)
        lines.append(
            "segments  " + ", ".join(f"{number / total:.1%} {name}" for name, number in numbers.items())
        )
    if (recording := found.recording) is not None:
        lines.append(
            f"recorded  {_printable(recording.time)} of {_printable(recording.source)}, for windows of "
            f"{recording.window_frames} frames"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "reference",
        "Run a model on frames like those that it is to see, and record in its archive how many detections, which "
        "scores, classes, sizes, distances and clouds there were. A server compares with that what it sees, as metrics "
        "with an alert. With --from, copy the reference of a former version instead, so that what the new version "
        "changes shows as drift. Exit status: 0 recorded or copied, 2 error, 3 no frame could be predicted.",
        [
            "reference second.mar velodyne/",
            "reference second.mar s3://bucket/val --out watched/second.mar --score-thr 0.4",
            "reference second-2.0.mar --from second-1.0.mar",
        ],
    )
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="path of the archive (.mar)")
    parser.add_argument(
        "source", nargs="?", metavar="FRAMES", help="what predict takes: folder, pattern, video, s3://…"
    )
    parser.add_argument(
        "--from",
        dest="copied_from",
        type=Path,
        metavar="ARCHIVE",
        help="copy the reference of this archive, of the same modality and classes, instead of running the model",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write another archive (default: replace ARCHIVE)"
    )
    parser.add_argument(
        "--score-thr",
        type=bounded(float, 0, 1),
        default=SCORE_THR,
        metavar="SCORE",
        help="score from which a detection counts (default: %(default)g)",
    )
    parser.add_argument(
        "--window-frames",
        type=bounded(int, 1),
        default=WINDOW_FRAMES,
        metavar="N",
        help="least frames that will be compared with it, as --gateway-watch-window-frames says (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=bounded(int, 1, 256),
        default=1,
        metavar="N",
        help="frames per batch (default: %(default)s)",
    )
    parser.add_argument("--columns", help="columns of the point clouds, as in x,y,z,intensity=0")
    parser.add_argument("--device", help="cpu or cuda:N (default: cuda:0 if available)")
    return parser
