"""What is computed: a job, its parts and their frames, and what every engine does with one part."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any, Protocol

import orjson

from serve.bulk.destination import Destination
from serve.bulk.retry import SourceGone, on_server, read_patiently
from serve.errors import InferenceFailed, SetupError, UndecodableFrame, error_body
from serve.predict.frames import Clip, Frame, Prediction
from serve.predict.journal import line_of
from serve.predict.models import Model, open_archive
from serve.predict.pipeline import predict_frames
from serve.predict.sources import frame_at
from serve.protocol.batching import BATCH_PIXELS, BATCH_POINTS, BatchRule
from serve.protocol.options import FrameOptions

__all__ = [
    "LOADING",
    "Counts",
    "Engine",
    "Job",
    "Part",
    "compute_part",
    "frames_of",
    "manifest_line",
    "predict_part",
]

LOADING = -1
_MOST_STARTS = 3
_MOST_ENDS = 2
_CLIP = Clip("bulk")
_LOCAL_READERS = 2
_REMOTE_READERS = 8  # they wait for the network


@dataclass(frozen=True)
class Job:
    """What every part needs; goes to the processes that compute.

    Attributes:
        archive: path of the archive on this machine.
        trust_code: import modules packed in it.
        options: of every frame.
        batch_size: most frames in a batch.
        batch_cost: most points or pixels in a batch; those of the gateway if None.
        open_model: opens an archive on a device: a function of a module, which each process calls once.
    """

    archive: str
    trust_code: bool
    options: FrameOptions
    batch_size: int
    open_model: Callable[..., Model] = open_archive
    batch_cost: int | None = None

    def rule(self, model: Model) -> BatchRule:
        """Which frames share a batch, as in the gateway."""
        return BatchRule.of(
            model.description,
            frames=self.batch_size,
            points=self.batch_cost or BATCH_POINTS,
            pixels=self.batch_cost or BATCH_PIXELS,
        )


@dataclass
class Counts:
    """Counts of a part or of a run.

    Attributes:
        frames: frames, answered and failed.
        failed: failed frames by the code of their error.
        detections: detections by class.
        warnings: frames by the code of a warning in their answers.
    """

    frames: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    detections: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, prediction: Prediction) -> None:
        """Count one frame."""
        self.frames += 1
        if prediction.error is not None:
            self.failed[prediction.error.code] += 1
            return
        answer = prediction.answer or {}
        self.detections.update(answer.get("names", ()))
        self.warnings.update({warning["code"] for warning in answer.get("warnings", ())})

    def merge(self, other: Counts) -> None:
        """Add the counts of a part."""
        self.frames += other.frames
        self.failed += other.failed
        self.detections += other.detections
        self.warnings += other.warnings

    def figures(self) -> dict[str, Any]:
        """Return the counts for JSON; most frequent first."""
        return {
            "frames": self.frames,
            "answered": self.frames - self.failed.total(),
            **{
                name: dict(getattr(self, name).most_common()) for name in ("failed", "detections", "warnings")
            },
        }

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Counts:
        """Read what `figures` returned."""
        counters = {name: Counter(figures[name]) for name in ("failed", "detections", "warnings")}
        return cls(figures["frames"], **counters)


@dataclass
class Part:
    """A part that is to be computed, and what is known of the processes that ended with it.

    A process that ends by itself (out of memory, a fault of a library, a lost machine) takes its part with it. The part
    is computed again one frame at a time; a frame with which a process ends twice more gets an error, and the rest of
    the part goes on.

    Attributes:
        number: its number.
        lines: its lines of the manifest.
        cautious: one frame at a time, because a process has ended with it.
        suspects: how often a process ended while it computed a frame alone, by the frame's index.
        starts: processes that ended with it before they had loaded the model.
    """

    number: int
    lines: Sequence[bytes]
    cautious: bool = False
    suspects: Counter[int] = field(default_factory=Counter)
    starts: int = 0

    @property
    def deadly(self) -> frozenset[int]:
        """Frames that are given up: once may be chance, such as a kill of the system for another process's memory."""
        return frozenset(index for index, times in self.suspects.items() if times >= _MOST_ENDS)

    def record_end(self, begun: int, place: str) -> None:
        """Find out what ended the process that computed this part: the frame that it had, if it had one alone.

        Args:
            begun: what `compute_part` reported last: the number of frames begun, or `LOADING`.
            place: device or machine of the process.

        Raises:
            SetupError: processes end before they have loaded the model.
        """
        if begun == LOADING:
            self.starts += 1
            if self.starts >= _MOST_STARTS:
                raise SetupError(
                    f"{self.starts} processes for {place} ended before they had loaded the model; is there enough "
                    "memory? try fewer --processes"
                )
            return
        if self.cautious and begun > 0:
            self.suspects[begun - 1] += 1
        self.cautious = True


class Engine(Protocol):
    """Where parts are computed: processes of this machine, or a cluster."""

    def compute(
        self, parts: Iterator[Part], job: Job, destination: Destination, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Counts]]:
        """Compute parts side by side, and yield number and counts of each when it is finished, in any order.

        Closing the iterator ends everything that computes.

        Args:
            parts: the parts; taken when something is free to compute them.
            job: what every part needs.
            destination: takes the results.
            advance: called with the number of frames that were begun since the last call; negative if a part begins
                anew, 0 now and then. Never by two threads at a time, but not always by the one that iterates.

        Raises:
            ServeError: the model cannot be loaded, or the destination not be written.
        """


def manifest_line(frame: Frame) -> bytes:
    """Encode where a frame is, from which `frames_of` makes it again.

    Raises:
        UndecodableFrame: its name is not UTF-8.
    """
    try:
        return orjson.dumps({"frame": frame.name, "stem": frame.stem, "origin": frame.origin}) + b"\n"
    except TypeError:
        raise UndecodableFrame(
            f"the name {os.fsencode(frame.name)!r} of a frame, or its folder's, is not UTF-8; rename it"
        ) from None


def frames_of(lines: Iterable[bytes]) -> list[Frame]:
    """Make frames of lines of the manifest."""
    found = map(orjson.loads, lines)
    return [_patient(frame_at(each["frame"], each["stem"], each["origin"], _CLIP)) for each in found]


def _patient(frame: Frame) -> Frame:
    """Let a frame of a bucket or web server be read again if that fails for a time."""
    if frame.origin is None or not _is_on_server(frame):
        return frame
    return replace(frame, read=partial(read_patiently, frame.read, frame.origin))


def compute_part(
    model: Model,
    job: Job,
    destination: Destination,
    number: int,
    lines: Sequence[bytes],
    cautious: bool,
    deadly: frozenset[int],
    begun: Callable[[int], None],
    queued: Callable[[], None] = lambda: None,
) -> Counts:
    """Predict a part and put its results into the destination, in the process that has the model.

    Args:
        model: the model.
        job: options and batch size.
        destination: takes the results.
        number: of the part.
        lines: the part's lines of the manifest.
        cautious: as `Part.cautious`.
        deadly: as `Part.deadly`.
        begun: called with the number of frames that are finished, of a cautious part with that of the frames begun.
        queued: called when the last batch was queued for the model.
    """
    with destination.writing(destination.part_name(number)) as out:
        counts = predict_part(
            model, job, lines, out, cautious=cautious, deadly=deadly, begun=begun, queued=queued
        )
        # Before the part appears, so that every part that is there has its counts.
        destination.write(destination.counts_name(number), orjson.dumps(counts.figures()))
    return counts


def predict_part(
    model: Model,
    job: Job,
    lines: Sequence[bytes],
    out: IO[bytes],
    *,
    cautious: bool = False,
    deadly: frozenset[int] = frozenset(),
    begun: Callable[[int], None] = lambda index: None,
    queued: Callable[[], None] = lambda: None,
) -> Counts:
    """Predict the frames of a part and write one line for each, in order.

    Args:
        model: the model.
        job: options and batch size.
        lines: the part's lines of the manifest.
        out: takes the results.
        cautious: one frame at a time, so that the one that ends the process is known.
        deadly: indices of frames that have ended a process; they get an error instead.
        begun: called with the number of frames that are finished, of a cautious run with that of the frames begun.
        queued: called when the last batch was queued for the model.
    """
    frames = frames_of(lines)
    counts = Counts()
    for prediction in _predictions(model, job, frames, cautious, deadly, begun, queued):
        if isinstance(prediction.error, SourceGone):
            raise prediction.error
        out.write(line_of(prediction))
        counts.add(prediction)
        if not cautious:
            begun(counts.frames)
    return counts


def _predictions(
    model: Model,
    job: Job,
    frames: Sequence[Frame],
    cautious: bool,
    deadly: frozenset[int],
    begun: Callable[[int], None],
    queued: Callable[[], None],
) -> Iterator[Prediction]:
    if not cautious:
        readers = _REMOTE_READERS if any(map(_is_on_server, frames)) else _LOCAL_READERS
        predictions = predict_frames(
            frames,
            model,
            job.options,
            rule=job.rule(model),
            ahead=2 * readers,
            readers=readers,
            submitted=queued,
        )
        with closing(predictions) as found:
            yield from found
        return
    for index, frame in enumerate(frames):
        if index in deadly:
            error = InferenceFailed(
                "the process ended while it computed this frame, three times; out of memory, or a fault of the model"
            )
            yield Prediction(frame, orjson.dumps(error_body(error)), error=error)
            continue
        begun(index + 1)
        with closing(predict_frames([frame], model, job.options)) as found:
            yield from found


def _is_on_server(frame: Frame) -> bool:
    origin = frame.origin
    return any(map(on_server, origin.values() if isinstance(origin, Mapping) else (str(origin),)))
