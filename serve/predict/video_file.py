"""A video file that is written frame by frame, with the times of its source."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from serve.errors import SettingsError, StorageError
from serve.predict.frames import Image, Moment
from serve.predict.video import load_av

__all__ = ["CONTAINERS", "VideoFile"]

#: File name suffix → FFmpeg's name of the container, and encoders, the preferred first.
CONTAINERS = {
    ".mp4": ("mp4", ("libx264", "libopenh264", "mpeg4")),
    ".mov": ("mov", ("libx264", "libopenh264", "mpeg4")),
    ".mkv": ("matroska", ("libx264", "libopenh264", "mpeg4")),
    ".webm": ("webm", ("libvpx-vp9", "libvpx")),
    ".avi": ("avi", ("mpeg4",)),
}
# mpeg4 counts in at most 65,535 parts of a second, AVI in frames only.
_CONSTANT_RATE = "mpeg4"


class VideoFile:
    """A video under a hidden name, until it is finished and gets its own."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        """Choose container and encoder; the first frame decides the size.

        Args:
            path: the file; its folder must exist.
            rate: frames per second, of frames without times.

        Raises:
            MissingPackage: PyAV is not installed.
            SettingsError: no container has this suffix, or PyAV lacks its encoder.
        """
        self._av = load_av()
        if path.suffix.lower() not in CONTAINERS:
            raise SettingsError(f"{path.name} is no video; its name must end in {', '.join(CONTAINERS)}")
        self._format, encoders = CONTAINERS[path.suffix.lower()]
        known = self._av.codecs_available
        found = [name for name in encoders if name in known]
        if not found:
            raise SettingsError(
                f"this PyAV has no encoder for {path.suffix} ({', '.join(encoders)}); choose .mp4 or .avi"
            )
        self.path, self._rate, self._encoder = path, rate, found[0]
        self._part: Path | None = None
        self._container: Any = None
        self._stream: Any = None
        self._time_base = 1 / rate
        self._origin: Fraction | None = None
        self._next = 0

    def write(self, image: Image, moment: Moment | None = None) -> None:
        """Append a frame.

        Args:
            image: (H, W, 3) BGR; scaled into the first frame's size if it has another.
            moment: its time in the source; None for one step after the last.
        """
        with self._errors_mapped():
            if self._container is None:
                self._open(image, moment)
            frame = self._av.VideoFrame.from_ndarray(
                _fit(image, self._stream.width, self._stream.height), format="bgr24"
            )
            frame.time_base = self._time_base
            pts = self._next
            if moment is not None and self._encoder != _CONSTANT_RATE:
                at = moment.pts * moment.time_base
                self._origin = at if self._origin is None else self._origin
                pts = max(pts, round((at - self._origin) / self._time_base))
            frame.pts = pts
            self._next = pts + (1 if moment is not None else max(1, round(1 / self._rate / self._time_base)))
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> Path | None:
        """Write what the encoder holds back and give the file its name; None without a frame."""
        if self._container is None or self._part is None:
            return None
        with self._errors_mapped():
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._container = None
            os.chmod(self._part, 0o644)
            os.replace(self._part, self.path)
        return self.path

    def abort(self) -> None:
        """Remove what was written; nothing after `finish`."""
        if self._container is not None:
            self._container.close()
            self._container = None
            assert self._part is not None
            self._part.unlink(missing_ok=True)

    def _open(self, image: Image, moment: Moment | None) -> None:
        handle, part = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part")
        os.close(handle)
        self._part = Path(part)
        self._container = self._av.open(part, "w", format=self._format)
        self._stream = self._container.add_stream(self._encoder, rate=self._rate)
        height, width = image.shape[:2]
        # H.264's usual pixels share their colour two by two.
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        if self._encoder == _CONSTANT_RATE:
            self._stream.bit_rate = 8_000_000
        elif moment is not None:
            self._time_base = moment.time_base
            self._stream.codec_context.time_base = self._time_base

    @contextmanager
    def _errors_mapped(self) -> Iterator[None]:
        """Map errors of FFmpeg and of the disk."""
        try:
            yield
        except (self._av.error.FFmpegError, OSError) as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}") from error


def _fit(image: Image, width: int, height: int) -> Image:
    """Scale an image into a size, with black borders; one odd row or column is repeated."""
    rows, columns = image.shape[:2]
    if (columns, rows) == (width, height):
        return np.ascontiguousarray(image)
    if (columns + columns % 2, rows + rows % 2) == (width, height):
        return np.pad(image, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")
    scale = min(width / columns, height / rows)
    small = cv2.resize(
        image, (max(1, round(columns * scale)), max(1, round(rows * scale))), interpolation=cv2.INTER_AREA
    )
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    return canvas
