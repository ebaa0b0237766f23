"""One run of ``mmdet3d-serve predict``: frames of a source through a model into files, able to go on after a stop."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from serve.errors import BadRequest, UndecodableFrame
from serve.predict.frames import Prediction
from serve.predict.journal import Journal, line_of
from serve.predict.kitti import CameraFinder
from serve.predict.models import Model
from serve.predict.pipeline import predict_frames
from serve.predict.recording_files import McapWriter, RrdWriter
from serve.predict.sources import Source
from serve.predict.tracks import ClipTracks
from serve.predict.video import load_av
from serve.predict.video_file import CONTAINERS
from serve.predict.writers import (
    PICTURE_SCORE_THR,
    CocoWriter,
    CsvWriter,
    Drawing,
    JsonWriter,
    KittiWriter,
    PictureWriter,
    VideoWriter,
    Writer,
)
from serve.protocol.json_bodies import encode_json
from serve.protocol.options import FrameOptions
from serve.storage import is_remote
from serve.tracking import TrackOptions

__all__ = ["FORMATS", "Run", "Summary", "formats_of", "run"]

FORMATS = ("json", "jsonl", "kitti", "coco", "csv", "picture", "video", "mcap", "rrd")
_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".txt": "kitti",
    ".csv": "csv",
    ".mcap": "mcap",
    ".rrd": "rrd",
    **dict.fromkeys((".png", ".jpg", ".jpeg"), "picture"),
    **dict.fromkeys(CONTAINERS, "video"),
}
_OF_ONE_FRAME = ("json", "kitti", "picture")
# Of an answer, what has one entry per detection.
_ROWS = frozenset(f"{name}{suffix}" for name in ("bboxes", "scores", "labels") for suffix in ("", "_3d")) | {
    "names",
    "masks",
}


@dataclass(frozen=True)
class Run:
    """What to predict, and where to.

    Attributes:
        source: the frames.
        model: the model.
        out: folder, or file if its name has a suffix; None for standard output.
        formats: some of `FORMATS`.
        options: of every frame; a minimum score applies to every format.
        drawn_score_thr: minimum score in pictures and videos.
        only: names of classes to keep; empty for all.
        batch_size: frames per batch.
        max_frames: stop after as many; None for all.
        calibration: path or URI of a file or folder for KITTI's labels.
        image_size: width and height of the images that KITTI's labels refer to.
        annotations: COCO annotation file with the ids of images and categories.
        rate: frames per second of a video of frames without times.
        overwrite: compute again what the output folder has, of another run too.
        tracks: give the detections the ids of tracks by these rules; None for no ids.
    """

    source: Source
    model: Model
    out: Path | None
    formats: tuple[str, ...]
    options: FrameOptions = field(default_factory=FrameOptions)
    drawn_score_thr: float = PICTURE_SCORE_THR
    only: tuple[str, ...] = ()
    batch_size: int = 1
    max_frames: int | None = None
    calibration: str | Path | None = None
    image_size: tuple[int, int] | None = None
    annotations: Path | None = None
    rate: Fraction = Fraction(10)
    overwrite: bool = False
    tracks: TrackOptions | None = None


@dataclass
class Summary:
    """What a run did.

    Attributes:
        predicted: frames that this run predicted.
        kept: frames that a former run had finished.
        failed: name and error of frames that failed.
        warnings: code and message of warnings about frames, with the number of frames.
        written: files and folders.
        stopped: whether Ctrl-C ended a camera or stream.
    """

    predicted: int = 0
    kept: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    warnings: Counter[tuple[str, str]] = field(default_factory=Counter)
    written: list[Path] = field(default_factory=list)
    stopped: bool = False


def formats_of(out: Path | None, formats: Sequence[str], count: int | None) -> tuple[str, ...]:
    """Choose the formats of a run.

    Args:
        out: folder, or file if its name has a suffix.
        formats: as asked for; empty to choose by `out`.
        count: number of frames, if known.

    Raises:
        BadRequest: they do not go together.
    """
    if out is None:
        chosen = tuple(formats) or ("json" if count == 1 else "jsonl",)
        if set(chosen) - {"json", "jsonl"} or len(chosen) > 1:
            raise BadRequest(
                f"--format {','.join(chosen)} needs --out FOLDER; only json or jsonl go to standard output"
            )
        return chosen
    if not is_file(out):
        return tuple(dict.fromkeys(formats)) or ("json",)
    by_name = _BY_SUFFIX.get(out.suffix.lower())
    if out.suffix.lower() == ".json":
        by_name = "coco" if "coco" in formats else "json"
    if by_name is None or set(formats) - {by_name}:
        raise BadRequest(
            f"--out {out} is one file, {'of no known format' if by_name is None else f'of format {by_name}'}"
            f"{f', not {chr(44).join(formats)}' if formats else ''}; name a folder for several formats"
        )
    if by_name in _OF_ONE_FRAME and count != 1:
        raise BadRequest(
            f"--out {out} is a file for one frame, and the source has {'several' if count is None else count}; name a "
            "folder, or a .jsonl, .csv or .mp4 file"
        )
    return (by_name,)


def is_file(out: Path) -> bool:
    """Whether `out` names a file rather than a folder."""
    return not out.is_dir() and re.fullmatch(r"\.[A-Za-z0-9]{2,5}", out.suffix) is not None


def run(
    task: Run,
    *,
    output: IO[bytes] | None = None,
    progress: Callable[[Prediction], None] = lambda prediction: None,
) -> Summary:
    """Predict all frames of a source.

    Args:
        task: what to predict, and where to.
        output: receives the lines of a run without `Run.out`; standard output if None.
        progress: called with every prediction when it is recorded.

    Raises:
        BadRequest: outputs that do not go together, or that lack something, which the message names.
        KeyboardInterrupt: Ctrl-C; what is finished is recorded. A camera or stream ends its files instead.
        ServeError: the source or the model as a whole failed.
    """
    if task.out is None:
        return _predict(task, None, [_Lines(output or sys.stdout.buffer, task.formats)], progress)
    predictions, outputs = _identity(task)
    if not is_file(task.out):
        with Journal(task.out, predictions, outputs, overwrite=task.overwrite) as journal:
            if task.overwrite:
                _clear(task.out)
            summary = _predict(task, journal, _writers(task, task.out, None), progress)
            summary.written.append(journal.finish())
        return summary
    # One file: the record is in a hidden folder beside it until the run is finished.
    hidden = task.out.with_name(f".{task.out.name}.unfinished")
    with Journal(hidden, predictions, outputs, overwrite=task.overwrite or task.source.live) as journal:
        try:
            summary = _predict(task, journal, _writers(task, hidden, task.out), progress)
        except BaseException:
            if journal.is_empty():
                shutil.rmtree(hidden)
            raise
        if task.formats == ("jsonl",):
            shutil.copyfile(journal.finish(), hidden / "copy")
            (hidden / "copy").replace(task.out)
            summary.written.append(task.out)
    if not summary.failed:  # else the next run tries these again
        shutil.rmtree(hidden)
    return summary


def _predict(
    task: Run, journal: Journal | None, writers: Sequence[Writer], progress: Callable[[Prediction], None]
) -> Summary:
    summary = Summary()
    resumes = journal is not None and not task.source.live
    redraw = journal is not None and not journal.same_outputs
    tracks = ClipTracks(task.tracks, task.rate) if task.tracks is not None else None
    predictions = predict_frames(
        islice(task.source, task.max_frames),
        task.model,
        task.options,
        batch_size=task.batch_size,
        ahead=0 if task.source.live else 4,
        finished=journal.find if journal is not None and resumes else lambda frame: None,
        keep_body=any(writer.needs_body for writer in writers),
    )
    try:
        with closing(predictions):
            try:
                for prediction in predictions:
                    found = _keep_classes(prediction, task.only)
                    # A frame before it may have failed in the former run, and its ids differ then.
                    followed = found if tracks is None else tracks.follow(found)
                    changed, found = followed is not found, followed
                    for writer in writers:
                        try:
                            writer.write(found, is_new=found.is_new or redraw or changed)
                        except UndecodableFrame as error:
                            summary.failed.append((found.frame.name, str(error)))
                    if journal is not None and (found.is_new or changed):
                        journal.append(found)
                    _count(summary, found)
                    progress(found)
            except KeyboardInterrupt:
                if not task.source.live:
                    raise
                summary.stopped = True
        for writer in writers:
            summary.written += writer.finish(journal.lines() if journal is not None else ())
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    return summary


def _keep_classes(prediction: Prediction, only: Sequence[str]) -> Prediction:
    """Drop the detections of all other classes."""
    answer = prediction.answer
    if not only or answer is None or not prediction.is_new or "names" not in answer:
        return prediction
    kept = [k for k, name in enumerate(answer["names"]) if name in only]
    rows = {
        key: [value[k] for k in kept] if isinstance(value, list) else np.asarray(value)[kept]
        for key, value in answer.items()
        if key in _ROWS
    }
    filtered = {**answer, **rows}
    return replace(prediction, answer=filtered, encoded=encode_json(filtered))


def _count(summary: Summary, prediction: Prediction) -> None:
    if prediction.error is not None:
        summary.failed.append((prediction.frame.name, str(prediction.error)))
    elif prediction.is_new:
        summary.predicted += 1
    else:
        summary.kept += 1
    for warning in (prediction.answer or {}).get("warnings", ()):
        summary.warnings[warning["code"], warning["message"]] += 1


def _identity(task: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what predictions depend on, and what files made of them depend on besides."""
    what = task.source.what
    local = Path(what).expanduser()
    predictions: dict[str, Any] = {
        "source": str(local.absolute()) if local.exists() else what,
        "model": dict(task.model.identity),
        "options": {name: value for name, value in asdict(task.options).items() if value},
        "only": list(task.only),
        "max_frames": task.max_frames,
    }
    if task.tracks is not None:
        predictions["tracks"] = {**asdict(task.tracks), "rate": str(task.rate)}
    if task.source.live:
        predictions["started"] = time.time()  # another minute of a camera is another run
    outputs = {
        "drawn_score_thr": task.drawn_score_thr,
        "calibration": _absolute(task.calibration) if task.calibration else None,
        "image_size": list(task.image_size) if task.image_size else None,
    }
    return predictions, outputs


def _absolute(path: str | Path) -> str:
    return str(path) if is_remote(path) else str(Path(path).absolute())


def _writers(task: Run, folder: Path, target: Path | None) -> list[Writer]:
    score_thr = max(task.drawn_score_thr, task.options.score_thr)
    drawing = Drawing(score_thr, task.model.load_dim, columns=task.options.columns)
    writers: list[Writer] = []
    for name in task.formats:
        match name:
            case "json":
                writers.append(JsonWriter(folder / name, target))
            case "kitti":
                cameras = CameraFinder(task.calibration, task.image_size)
                writers.append(KittiWriter(folder / name, cameras, target))
            case "picture":
                writers.append(PictureWriter(folder / "pictures", drawing, target))
            case "video":
                load_av()
                writers.append(VideoWriter(folder / "videos", drawing, task.rate, target))
            case "mcap":
                writers.append(McapWriter(folder / "recordings", drawing, task.rate, target))
            case "rrd":
                writers.append(RrdWriter(folder / "recordings", drawing, task.rate, target))
            case "csv":
                writers.append(CsvWriter(target or folder / "predictions.csv"))
            case "coco":
                writers.append(CocoWriter(target or folder / "coco.json", task.annotations))
    return writers


def _clear(folder: Path) -> None:
    """Remove what a former run made in its folder."""
    for name in ("json", "kitti", "pictures", "videos", "recordings"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for file in ("predictions.csv", "coco.json", "coco_ids.json"):
        (folder / file).unlink(missing_ok=True)


class _Lines(Writer):
    """Standard output: answers alone, or lines that name the frame."""

    def __init__(self, file: IO[bytes], formats: Sequence[str]) -> None:
        self._file, self._bare = file, "json" in formats

    def write(self, prediction: Prediction, *, is_new: bool) -> None:
        if not self._bare:
            self._file.write(line_of(prediction))
        elif prediction.error is None:
            self._file.write(prediction.encoded + b"\n")
        self._file.flush()
