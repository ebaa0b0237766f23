"""A sample of frames kept for later labelling: chosen in the event loop, written by a thread of its own.

A request never waits for it: what the thread cannot take is dropped and counted. Another thread copies before, what
would keep a longer body in memory while it waits. Kept are the bytes of a frame as they
were sent, its options, its answer, and the version of the model; nothing of the request or the client.

    DEST/second/1.0/2026-11-28/174501-123-5f0c9a1e.bin     the frame; a folder of its parts if it has several
    DEST/second/1.0/2026-11-28/174501-123-5f0c9a1e.json    time, model, version, options, answer

A day's folder is one that `predict`, `bulk` and `compare` read.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import re
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson

from serve import storage
from serve.errors import ServeError, SettingsError, StorageError, UndecodableFrame
from serve.gateway.backend import Answer
from serve.gateway.batcher import BatchResult
from serve.gateway.frame_copies import copy_views, join_pieces, share_frame
from serve.gateway.models import ModelVersion
from serve.gateway.offload import QUICK_BYTES
from serve.gateway.options import GatewayOptions
from serve.protocol.batch import Bytes
from serve.protocol.batching import only_part
from serve.protocol.options import DEFAULT_OPTIONS
from serve.protocol.point_signatures import sniff
from serve.protocol.worker import EncodedFrame

__all__ = ["FrameSampler", "SampleOutcome", "open_sampler"]

SampleOutcome = Literal["kept", "limited", "busy", "failed"]

# Frames that wait for the thread; more are dropped.
_MAX_WAITING, _MAX_WAITING_BYTES = 16, 64 << 20
_SWEEP_S = 600.0
_CLOSE_S = 10.0
_LOG_S = 60.0
_POINT_SUFFIXES = {"npy": ".npy", "npz": ".npz", "PCD": ".pcd", "PLY": ".ply"}
_IMAGE_SUFFIXES = (
    (b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"BM", ".bmp"), (b"GIF8", ".gif"), (b"II*\x00", ".tiff"),
    (b"MM\x00*", ".tiff"), (b"\x00\x00\x00\x0cjP  ", ".jp2"), (b"P5", ".pgm"), (b"P6", ".ppm"),
)  # fmt: skip
_SUFFIXES = {
    ".bin",
    ".json",
    ".las",
    ".laz",
    ".webp",
    ".avif",
    *_POINT_SUFFIXES.values(),
    *dict(_IMAGE_SUFFIXES).values(),
}
# Names that this module gives, half-written files included: no other file is written, and none is ever removed.
_KEPT = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*/[0-9]+(\.[0-9]+)*/(?P<day>\d{4}-\d\d-\d\d)/"
    r"\.?(?P<time>\d{6}-\d{3})-[0-9a-f]{8}(/\.?[A-Za-z0-9_][A-Za-z0-9._-]*)?"
    rf"({'|'.join(map(re.escape, sorted(_SUFFIXES)))})(\.part)?"
)

logger = logging.getLogger(__name__)


class _Destination(Protocol):
    def write(self, name: str, data: Bytes) -> None: ...

    def list(self) -> Iterator[tuple[str, int]]:
        """Yield names and sizes in bytes."""

    def remove(self, name: str) -> None: ...


@dataclass(frozen=True)
class _Folder:
    """A folder of this machine that only its owner reads."""

    root: Path

    def write(self, name: str, data: Bytes) -> None:
        path = self.root / name
        for folder in reversed(path.parents[: len(Path(name).parts)]):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def list(self) -> Iterator[tuple[str, int]]:
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):  # another process removed it
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield path.relative_to(self.root).as_posix(), found.st_size

    def remove(self, name: str) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        for folder in path.parents[: len(Path(name).parts) - 1]:
            try:
                folder.rmdir()  # if it is empty now
            except OSError:
                return


@dataclass(frozen=True)
class _Bucket:
    """A bucket or a prefix of one."""

    where: storage.Location

    def write(self, name: str, data: Bytes) -> None:
        from serve.storage import s3

        s3.connect(self.where.cluster).write(self.where.join(name), data)

    def list(self) -> Iterator[tuple[str, int]]:
        from serve.storage import s3

        for entry in s3.connect(self.where.cluster).list(self.where, recursive=True):
            if not entry.is_folder:
                yield entry.name, entry.size

    def remove(self, name: str) -> None:
        from serve.storage import s3

        s3.connect(self.where.cluster).remove(self.where.join(name))


@dataclass(frozen=True)
class _Sample:
    """A frame on its way to the destination."""

    model: str
    folder: str
    parts: Mapping[str, Bytes]
    options: Mapping[str, Any]
    answer: bytes
    time: datetime


class FrameSampler:
    """Keeps a share of the frames that are answered.

    Args:
        destination: where they go.
        options: share, rate and retention.
        count: called with the name of a model and what became of a frame that was chosen; by any thread.
        clock: returns seconds.
        draw: returns a random number in [0, 1).
    """

    def __init__(
        self,
        destination: _Destination,
        options: GatewayOptions,
        count: Callable[[str, SampleOutcome], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._destination, self._options, self._count = destination, options, count
        self._clock, self._draw = clock, draw
        self._chosen: deque[float] = deque(maxlen=options.sample_per_minute)  # when, in the last minute
        self._queue: queue.Queue[tuple[_Sample, int] | None] = queue.Queue()
        self._waiting = self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._logged_at = float("-inf")
        self._copies = ThreadPoolExecutor(1, "frame-copy")
        self._thread = threading.Thread(target=self._write_all, name="frame-sampler", daemon=True)
        self._thread.start()

    def observe(
        self, model: ModelVersion, frame: EncodedFrame, outcome: BatchResult[Answer] | ServeError
    ) -> None:
        """Perhaps keep a frame; a `serve.gateway.models.FrameObserver`."""
        if isinstance(outcome, ServeError) or self._draw() >= self._options.sample_share:
            return
        name = model.state.name
        if not self._is_within_rate():
            return self._count(name, "limited")
        nbytes = frame.nbytes + len(outcome.value.body)
        with self._lock:
            if self._waiting_bytes + nbytes > _MAX_WAITING_BYTES or self._waiting >= _MAX_WAITING:
                return self._count(name, "busy")
            self._waiting += 1
            self._waiting_bytes += nbytes
        taken = partial(self._take, model, share_frame(frame), outcome.value.body, nbytes, datetime.now(UTC))
        if nbytes <= QUICK_BYTES:
            return taken()
        self._copies.submit(taken)
        return None

    def _take(
        self, model: ModelVersion, frame: EncodedFrame, answer: Bytes, nbytes: int, time: datetime
    ) -> None:
        """Let go of the other frames of the request, and hand the frame to the thread that writes."""

        def hand_over() -> None:
            self._queue.put((_sample_of(model, frame, answer, time), nbytes))

        if not self._attempt("a sample cannot be kept", hand_over):
            self._count(model.state.name, "failed")
            with self._lock:
                self._waiting -= 1
                self._waiting_bytes -= nbytes

    def close(self) -> None:
        """Write what waits, for a while; nothing is observed any more."""
        self._copies.shutdown()
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _is_within_rate(self) -> bool:
        now = self._clock()
        if len(self._chosen) == self._chosen.maxlen and now - self._chosen[0] < 60:
            return False
        self._chosen.append(now)
        return True

    def _write_all(self) -> None:
        swept_at = float("-inf")
        while True:
            if self._clock() - swept_at >= _SWEEP_S:
                self._attempt("old samples cannot be removed", self.sweep)
                swept_at = self._clock()
            try:
                taken = self._queue.get(timeout=_SWEEP_S)
            except queue.Empty:
                continue
            if taken is None:
                return
            sample, nbytes = taken
            with self._lock:
                self._waiting -= 1
            is_kept = self._attempt("a sample cannot be kept", lambda sample=sample: self._write(sample))  # type: ignore[misc]
            self._count(sample.model, "kept" if is_kept else "failed")
            with self._lock:
                self._waiting_bytes -= nbytes
            del sample, taken

    def _attempt(self, what: str, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:
            if self._clock() - self._logged_at >= _LOG_S:
                self._logged_at = self._clock()
                known = isinstance(error, StorageError | OSError)
                logger.warning("%s: %s", what, error, exc_info=None if known else error)
            return False
        return True

    def _write(self, sample: _Sample) -> None:
        stem = f"{sample.time:%H%M%S}-{sample.time.microsecond // 1000:03d}-{secrets.token_hex(4)}"
        name = f"{sample.folder}/{sample.time:%Y-%m-%d}/{stem}"
        parts = sample.parts
        written: list[str] = []
        try:
            # What marks a folder as a frame comes last, so that half a frame is none.
            for part in sorted(parts, key=lambda part: part in ("calibration", "sweeps")):
                path = (name if len(parts) == 1 else f"{name}/{part}") + _suffix(part, parts[part])
                if not _KEPT.fullmatch(path):  # of a model that was not packed by this project
                    raise StorageError(
                        f"a frame cannot be kept as {path[:200]!r}, a name that no sweep would find"
                    )
                self._destination.write(path, parts[part])
                written.append(path)
            record = {
                "time": sample.time.isoformat(),
                "model": sample.folder.partition("/")[0],
                "version": sample.folder.partition("/")[2],
                "options": sample.options,
                "answer": orjson.Fragment(sample.answer),
            }
            self._destination.write(f"{name}.json", orjson.dumps(record))
        except BaseException:
            for path in written:  # a frame without its record, on a disk that is full
                with suppress(Exception):
                    self._destination.remove(path)
            raise

    def sweep(self) -> None:
        """Remove samples beyond the retention, the oldest first."""
        found = sorted(
            (match["day"], match["time"], name, size)
            for name, size in self._destination.list()
            if (match := _KEPT.fullmatch(name))
        )
        oldest = datetime.now(UTC) - timedelta(days=self._options.sample_days)
        oldest_kept = f"{oldest:%Y-%m-%d}", f"{oldest:%H%M%S}-{oldest.microsecond // 1000:03d}"
        total = sum(size for *_, size in found)
        for day, time_of_day, name, size in found:
            if (day, time_of_day) >= oldest_kept and total <= self._options.sample_bytes:
                return
            self._destination.remove(name)
            total -= size


def open_sampler(options: GatewayOptions, count: Callable[[str, SampleOutcome], None]) -> FrameSampler | None:
    """Open the sampler that `options` ask for; None if they ask for none.

    Raises:
        SettingsError: the destination cannot be written.
    """
    if options.sample is None:
        return None
    where = storage.parse(options.sample)
    if where.scheme == "s3":
        return FrameSampler(_Bucket(where), options, count)
    if where.scheme != "file":
        raise SettingsError(
            f"sample={options.sample} is no place for samples; give a folder or s3://BUCKET/PREFIX"
        )
    root = Path(where.path).expanduser()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"sample={options.sample} cannot be made: {error.strerror}") from None
    if not os.access(root, os.W_OK | os.X_OK):
        raise SettingsError(f"sample={options.sample} cannot be written by this user")
    return FrameSampler(_Folder(root), options, count)


def _sample_of(model: ModelVersion, frame: EncodedFrame, answer: Bytes, time: datetime) -> _Sample:
    owned = copy_views(frame)
    if isinstance(owned.body, Mapping):
        parts = owned.body
    else:
        parts = {only_part(model.spec or {}): join_pieces([owned.body, *owned.rest])}
    defaults = asdict(DEFAULT_OPTIONS)
    options = {name: value for name, value in asdict(frame.options).items() if value != defaults[name]}
    state = model.state
    return _Sample(state.name, f"{state.name}/{state.version}", parts, options, bytes(answer), time)


def _suffix(part: str, body: Bytes) -> str:
    """Choose the suffix by which a folder's frames are found; the formats themselves are known by their bytes."""
    if part in ("calibration", "sweeps"):
        return ".json"
    head = bytes(body[:16])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    image = next((suffix for magic, suffix in _IMAGE_SUFFIXES if head.startswith(magic)), None)
    if part.startswith("image"):
        return image or ".png"
    try:
        known = sniff(body)
    except UndecodableFrame:
        return image or ".bin"
    if known == "LAS":  # a compressed one says so in the format of its points (ASPRS LAS 1.4, LASzip)
        return ".laz" if len(body) > 104 and body[104] & 0x80 else ".las"
    return _POINT_SUFFIXES.get(known or "", ".bin")
