"""Frames of a source and their predictions, as the parts of this package hand them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from serve.client.frames import encode_points, frame_parts
from serve.errors import ServeError, UndecodableFrame
from serve.protocol.batch import Body

__all__ = [
    "Clip",
    "Frame",
    "FrameInput",
    "Image",
    "Moment",
    "Prediction",
    "as_body",
    "encode_pixels",
    "read_path",
]

Image = npt.NDArray[np.uint8]
# What the functions of this package take as one frame: a path, encoded bytes, a folder of parts or the parts by name,
# an image as (H, W, 3) uint8 BGR, or a point cloud as (N, load_dim) float32.
FrameInput = str | Path | Body | npt.NDArray[Any]


@dataclass(frozen=True)
class Clip:
    """A sequence of frames that a video of them would show: one video file, a stream, or all other frames.

    Attributes:
        name: of the files that are made of it, without a suffix.
        rate: frames per second; None for files, which have no times.
        live: a camera or stream, which cannot be read again and has no end of its own.
    """

    name: str
    rate: Fraction | None = None
    live: bool = False


@dataclass(frozen=True)
class Moment:
    """Place of a frame in its video: presentation time in units of `time_base` seconds."""

    pts: int
    time_base: Fraction


@dataclass(frozen=True)
class Frame:
    """One frame of a source, not read yet.

    Attributes:
        name: unique in its source: the path below the source's folder, for videos ``clip.mp4#000042``.
        stem: path of files made of it, without a suffix and relative to their folder; unique as well.
        clip: the sequence that it belongs to.
        read: returns the bytes of the frame, or of its parts by name.
        path: the file or folder, if it has one on this machine.
        etag: changes when the file does; empty if that is not known.
        pixels: returns the image of a frame of a video, (H, W, 3) BGR; None for other frames.
        moment: place in the video.
        origin: where the bytes are, from which `frame_at` makes the frame again in another process: path or URI, or the
            URI of each part; None for frames of videos.
    """

    name: str
    stem: str
    clip: Clip
    read: Callable[[], Body]
    path: Path | None = None
    etag: str = ""
    pixels: Callable[[], Image] | None = None
    moment: Moment | None = None
    origin: str | Mapping[str, str] | None = None


@dataclass(frozen=True)
class Prediction:
    """What a model made of one frame: an answer or an error.

    Attributes:
        frame: the frame.
        encoded: the answer as JSON, byte for byte what a server sends; the error as JSON if there is one.
        answer: the answer as a dictionary with a server's names (docs/answers.md); None if the frame failed.
        error: why it failed, or None.
        body: the frame's bytes, if they were asked for.
        is_new: whether it was computed now, not by a former run.
    """

    frame: Frame
    encoded: bytes
    answer: Mapping[str, Any] | None = None
    error: ServeError | None = None
    body: Body | None = None
    is_new: bool = True


def encode_pixels(image: Image, *, small: bool = False) -> bytes:
    """Encode an image without loss: as BMP, which costs no time, or as PNG, which is smaller.

    Args:
        image: (H, W, 3) uint8, BGR.
        small: as PNG, for a network.
    """
    if small:
        return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    return cv2.imencode(".bmp", image)[1].tobytes()


def as_body(frame: FrameInput) -> Body:
    """Return the bytes of a frame that is given as a path, as bytes or as an array.

    Raises:
        UndecodableFrame: the file cannot be read, or the array is neither an image nor a point cloud.
    """
    if isinstance(frame, str | Path):
        return read_path(Path(frame))
    if isinstance(frame, np.ndarray):
        is_image = frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
        return encode_pixels(frame) if is_image else encode_points(frame)
    return frame


def read_path(path: Path) -> Body:
    """Read a frame: a file, or a folder with one file per part.

    Raises:
        UndecodableFrame: it cannot be read.
    """
    try:
        if parts := frame_parts(path):
            return {part: file.read_bytes() for part, file in parts.items()}
        if path.exists() and not path.is_file():  # a pipe or device may have no end
            raise UndecodableFrame(f"{path} is neither a file nor a folder with the parts of a frame")
        return path.read_bytes()
    except OSError as error:
        raise UndecodableFrame(f"{path} cannot be read: {error.strerror}") from error
