"""Videos, cameras and streams through PyAV, frame by frame.

PyAV (FFmpeg in a wheel) is optional: ``pip install 'mmdet3d-serve[video]'``. Frames are turned upright, as players show
them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from serve.errors import MissingPackage, UndecodableFrame
from serve.predict.frames import Clip, Frame, Image, Moment, encode_pixels

__all__ = ["SUFFIXES", "Reader", "camera", "file", "load_av", "stream"]

logger = logging.getLogger(__name__)

#: File name suffixes that are read as videos.
SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".m2ts",
    ".wmv",
    ".flv",
    ".3gp",
)
_INSTALL = "videos need PyAV, which is not installed: pip install 'mmdet3d-serve[video]' (or pip install av)"
_STREAM_TIMEOUT_S = 15.0
_USUAL_RATE = Fraction(25)
_TURNS = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_CLOCKWISE}


def load_av() -> Any:
    """Import PyAV, which keeps FFmpeg's own messages to itself.

    To set a level of these is a trap: then the threads that decode wait for Python's lock to report, while Python
    holds it and waits for them to end.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingPackage(_INSTALL) from error
    return av


@dataclass(frozen=True)
class Reader:
    """Frames of one video, camera or stream, each time it is iterated from the start.

    Attributes:
        address: path, device or URL.
        clip: what its frames are part of.
        name: begin of the names of its frames.
        count: number of frames that the container declares; None if it does not.
        etag: changes when the file does.
        options: for FFmpeg.
        demuxer: FFmpeg's name of the device's format; None lets it look.
    """

    address: str
    clip: Clip
    name: str
    count: int | None = None
    etag: str = ""
    options: dict[str, str] = field(default_factory=dict)
    demuxer: str | None = None

    def __iter__(self) -> Iterator[Frame]:
        """Decode frame by frame; of a camera or stream those that are latest when the model is ready."""
        frames = self._decode()
        for index, picture in enumerate(_latest(frames) if self.clip.live else frames):
            pixels = partial(_upright, picture)
            yield Frame(
                f"{self.name}#{index:06d}",
                f"{self.clip.name}.{index:06d}",
                self.clip,
                lambda pixels=pixels: encode_pixels(pixels()),  # type: ignore[misc]
                etag=self.etag,
                pixels=pixels,
                moment=None if picture.pts is None else Moment(picture.pts, picture.time_base),
            )

    def _decode(self) -> Iterator[Any]:
        av = load_av()
        found = False
        with _opened(self) as container:
            pictures = container.streams.video[0]
            pictures.thread_type = "AUTO"
            packets = container.demux(pictures)
            while True:
                try:
                    decoded = next(packets).decode()
                except StopIteration:
                    break
                except av.error.InvalidDataError:
                    continue  # a damaged packet; players pass over it too
                except av.error.FFmpegError as error:
                    if not (found and self.clip.live):
                        raise
                    logger.warning("%s ended: %s", self.address, error.strerror or error)
                    break
                for picture in decoded:
                    found = True
                    yield picture
        if not found:
            raise UndecodableFrame(f"{self.address} has no frame that can be decoded; is the file complete?")


def file(path: Path, name: str | None = None) -> Reader:
    """Open a video file.

    Args:
        path: the file.
        name: of its frames, if not that of the file.

    Raises:
        UndecodableFrame: not a video, or one without pictures.
        MissingPackage: PyAV is not installed.
    """
    found = path.stat()
    bare = Reader(
        str(path), Clip(name or path.stem), path.name, etag=f"{found.st_size:x}-{found.st_mtime_ns:x}"
    )
    with _opened(bare) as container:
        pictures = container.streams.video[0]
        rate = pictures.average_rate or pictures.guessed_rate
        return Reader(
            bare.address,
            Clip(bare.clip.name, rate or _USUAL_RATE),
            bare.name,
            pictures.frames or None,
            bare.etag,
        )


def camera(number: int) -> Reader:
    """Open camera `number` of this machine (Video4Linux); it is opened when frames are read."""
    load_av()
    clip = Clip(f"camera{number}", _USUAL_RATE, live=True)
    return Reader(f"/dev/video{number}", clip, clip.name, demuxer="v4l2")


def stream(url: str) -> Reader:
    """Open a stream (RTSP, RTMP, HTTP, …); it is opened when frames are read."""
    load_av()
    name = "".join(
        c if c.isalnum() else "-" for c in url.partition("://")[2].partition("?")[0].rpartition("@")[2]
    )
    options = {"rtsp_transport": "tcp"} if url.startswith("rtsp") else {}
    return Reader(
        url, Clip(name[:60].strip("-") or "stream", _USUAL_RATE, live=True), "stream", options=options
    )


@contextmanager
def _opened(reader: Reader) -> Iterator[Any]:
    """Open a container with pictures; map FFmpeg's errors."""
    av = load_av()
    try:
        with av.open(
            reader.address,
            format=reader.demuxer,
            options=reader.options,
            timeout=_STREAM_TIMEOUT_S if reader.clip.live else None,
        ) as container:
            if not container.streams.video:
                raise UndecodableFrame(
                    f"{reader.address} has no pictures, only {len(container.streams)} other streams"
                )
            yield container
    except av.error.FFmpegError as error:
        if reader.demuxer:
            hint = "is a camera there, and may this user read it?"
        else:
            hint = "does the stream run?" if reader.clip.live else "is it a video, and complete?"
        raise UndecodableFrame(
            f"{reader.address} cannot be read ({error.strerror or error}); {hint}"
        ) from error


def _latest(frames: Iterator[Any]) -> Iterator[Any]:
    """Yield the latest frame each time, dropping those that came while the last one was worked on."""
    newest: deque[Any] = deque(maxlen=1)
    changed = threading.Condition()
    ended: list[BaseException | None] = []

    def read() -> None:
        problem: BaseException | None = None
        try:
            for frame in frames:
                with changed:
                    newest.append(frame)
                    changed.notify()
                if stop.is_set():
                    break
        except BaseException as error:
            problem = error
        with changed:
            ended.append(problem)
            changed.notify()

    stop = threading.Event()
    thread = threading.Thread(target=read, name="camera", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: newest or ended)
                if not newest:
                    if ended[0] is not None:
                        raise ended[0]
                    return
                frame = newest.popleft()
            yield frame
    finally:
        stop.set()


def _upright(picture: Any) -> Image:
    """Pixels of a decoded picture, (H, W, 3) BGR, turned as its display matrix says."""
    pixels: Image = picture.to_ndarray(format="bgr24")
    turn = _TURNS.get(round(picture.rotation / 90) * 90 % 360)
    return pixels if turn is None else np.asarray(cv2.rotate(pixels, turn), np.uint8)
