"""Outputs of a run, by format.

Formats of one file per frame (json, kitti, picture) are written as frames are finished, videos frame by frame, and
formats of one file for all frames (jsonl, csv, coco) from the record of the run at its end. Every file appears whole.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import cv2
import orjson

from serve.errors import ServeError, UndecodableFrame
from serve.formats.coco import CocoIds, results_of
from serve.formats.kitti import format_labels
from serve.formats.table import write_table
from serve.predict.frames import Clip, Image, Prediction
from serve.predict.kitti import CameraFinder
from serve.predict.video_file import VideoFile
from serve.protocol.batch import Body
from serve.storage import write_bytes
from serve.storage.cache import map_disk_errors
from serve.visualize.detections import draw_frame, draw_image, encode_png

__all__ = [
    "PICTURE_SCORE_THR",
    "CocoWriter",
    "CsvWriter",
    "Drawing",
    "JsonWriter",
    "KittiWriter",
    "PictureWriter",
    "VideoWriter",
    "Writer",
    "write_results",
]

#: Default of the lowest score in pictures and videos; that of upstream's demos.
PICTURE_SCORE_THR = 0.3
_JPEG_QUALITY = 95


class Writer:
    """Base of the formats: every method does nothing.

    Attributes:
        needs_body: whether `write` reads the bytes of frames.
    """

    needs_body: bool = False

    def write(self, prediction: Prediction, *, is_new: bool) -> None:
        """Take the next frame; `is_new` unless a former run has written its files already.

        Raises:
            UndecodableFrame: this frame cannot be written in this format.
            BadRequest: something is missing for every frame.
        """

    def finish(self, record: Iterable[Mapping[str, Any]]) -> list[Path]:
        """Write what is left, from the record of the run if need be; returns the files or folders written."""
        return []

    def abort(self) -> None:
        """Remove what is unfinished."""
        return


class JsonWriter(Writer):
    """``NAME.json``: the answer of each frame, byte for byte as a server sends it."""

    suffix = ".json"

    def __init__(self, folder: Path, target: Path | None = None) -> None:
        """Write into `folder`, or the one frame into `target`."""
        self._folder, self._target, self._written = folder, target, False

    def write(self, prediction: Prediction, *, is_new: bool) -> None:
        """Write the frame's file, if there is an answer and not yet a file of it."""
        if prediction.answer is None:
            return
        path = self._target or self._folder / f"{prediction.frame.stem}{self.suffix_of(prediction)}"
        if is_new or not path.exists():
            write_bytes(path, self.encode(prediction))
        self._written = True

    def suffix_of(self, prediction: Prediction) -> str:
        """Suffix of a frame's file."""
        return self.suffix

    def encode(self, prediction: Prediction) -> bytes:
        """Content of a frame's file."""
        return prediction.encoded

    def finish(self, record: Iterable[Mapping[str, Any]]) -> list[Path]:
        """Return what was written."""
        return [self._target or self._folder] if self._written else []


class KittiWriter(JsonWriter):
    """``NAME.txt``: KITTI's label files."""

    suffix = ".txt"
    needs_body = True

    def __init__(self, folder: Path, cameras: CameraFinder, target: Path | None = None) -> None:
        """Take cameras from `cameras`."""
        super().__init__(folder, target)
        self._cameras = cameras

    def encode(self, prediction: Prediction) -> bytes:
        """Write the labels of one frame."""
        assert prediction.answer is not None
        camera = self._cameras.find(prediction.frame, _body(prediction), prediction.answer)
        return format_labels(prediction.answer, camera).encode()


@dataclass(frozen=True)
class Drawing:
    """How predictions are drawn.

    Attributes:
        score_thr: lowest score.
        load_dim: float32 numbers per point of a ``.bin``.
        size: width and height of the drawing of a point cloud, pixels.
        columns: option of the frames; None without one.
    """

    score_thr: float = PICTURE_SCORE_THR
    load_dim: int | None = None
    size: tuple[int, int] = (1200, 900)
    columns: str | None = None

    def draw(self, prediction: Prediction) -> Image:
        """Draw a prediction into its frame; (H, W, 3) BGR.

        Raises:
            ServeError: the frame cannot be decoded.
            ValueError: the predictions cannot be drawn.
        """
        frame, answer = prediction.frame, prediction.answer
        assert answer is not None
        if frame.pixels is not None and "bboxes" in answer:
            return draw_image(frame.pixels(), answer, score_thr=self.score_thr)
        return draw_frame(
            _body(prediction),
            answer,
            load_dim=self.load_dim or 4,
            columns=self.columns,
            size=self.size,
            title=frame.name if _is_cloud(answer) else "",
            score_thr=self.score_thr,
        )


class PictureWriter(JsonWriter):
    """``NAME.jpg`` of images, ``NAME.png`` of point clouds: the frame with its predictions."""

    needs_body = True

    def __init__(self, folder: Path, drawing: Drawing, target: Path | None = None) -> None:
        """Draw as `drawing` does."""
        super().__init__(folder, target)
        self._drawing = drawing

    def suffix_of(self, prediction: Prediction) -> str:
        """``.png`` for point clouds, whose thin lines JPEG blurs."""
        return ".png" if _is_cloud(prediction.answer or {}) else ".jpg"

    def encode(self, prediction: Prediction) -> bytes:
        """Draw and encode."""
        with _drawing_errors(prediction):
            image = self._drawing.draw(prediction)
        suffix = self._target.suffix.lower() if self._target is not None else self.suffix_of(prediction)
        if suffix == ".png":
            return encode_png(image)
        return cv2.imencode(suffix, image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()


class VideoWriter(Writer):
    """``CLIP.mp4`` of every video, stream or folder, with the times of its source."""

    needs_body = True

    def __init__(self, folder: Path, drawing: Drawing, rate: Fraction, target: Path | None = None) -> None:
        """Write into `folder`, or the one video into `target`; `rate` is that of frames without times."""
        self._folder, self._drawing, self._rate, self._target = folder, drawing, rate, target
        self._clip: Clip | None = None
        self._file: VideoFile | None = None
        self._finished: list[Path] = []

    def write(self, prediction: Prediction, *, is_new: bool) -> None:
        """Append a frame; one that failed is shown without predictions if it is of a video, else left out."""
        frame = prediction.frame
        if frame.clip is not self._clip:
            self._close()
            path = self._target or self._folder / f"{frame.clip.name}.mp4"
            with map_disk_errors(str(path)):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._clip, self._file = frame.clip, VideoFile(path, frame.clip.rate or self._rate)
        assert self._file is not None
        if prediction.answer is not None:
            with _drawing_errors(prediction):
                image = self._drawing.draw(prediction)
        elif frame.pixels is not None:
            image = frame.pixels()
        else:
            return
        self._file.write(image, frame.moment)

    def finish(self, record: Iterable[Mapping[str, Any]]) -> list[Path]:
        """Finish the last video."""
        self._close()
        return self._finished

    def _close(self) -> None:
        if self._file is not None and (path := self._file.finish()):
            self._finished.append(path)
        self._file = None

    def abort(self) -> None:
        """Remove the unfinished video."""
        if self._file is not None:
            self._file.abort()
            self._file = None


class CsvWriter(Writer):
    """A table with one row per detection."""

    def __init__(self, target: Path) -> None:
        """Write to `target`."""
        self._target = target

    def finish(self, record: Iterable[Mapping[str, Any]]) -> list[Path]:
        """Write the table.

        Raises:
            BadRequest: the predictions are labels, not detections.
        """
        with replacing(self._target) as file:
            text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
            named = ((line["frame"], line["answer"]) for line in record if line.get("answer") is not None)
            write_table(text, named)
            text.detach()
        return [self._target]


class CocoWriter(Writer):
    """COCO's list of results, and beside it the ids that it uses, if no annotation file gave them."""

    def __init__(self, target: Path, annotations: Path | None = None) -> None:
        """Write to `target`.

        Raises:
            BadRequest: `annotations` is no COCO annotation file.
        """
        CocoIds(annotations)  # before anything is computed
        self._target, self._annotations = target, annotations

    def finish(self, record: Iterable[Mapping[str, Any]]) -> list[Path]:
        """Write the list.

        Raises:
            BadRequest: predictions are not boxes in images, or the annotation file lacks an image or class.
        """
        ids = CocoIds(self._annotations)
        with replacing(self._target) as file:
            write_results(file, record, ids)
        if self._annotations is not None:
            return [self._target]
        named = self._target.with_name(f"{self._target.stem}_ids.json")
        categories = [{"id": number, "name": name} for number, name in sorted(ids.categories.items())]
        write_bytes(named, orjson.dumps({"images": ids.images, "categories": categories}))
        return [self._target, named]


def write_results(file: IO[bytes], record: Iterable[Mapping[str, Any]], ids: CocoIds) -> None:
    """Write COCO's results as a JSON list, one after the other; arguments and errors as `results_of`."""
    separator = b"[\n"
    for result in results_of(record, ids):
        file.write(separator + orjson.dumps(result))
        separator = b",\n"
    file.write(b"\n]\n" if separator == b",\n" else b"[]\n")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name when it is whole."""
    with map_disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        ) as file:
            part = Path(file.name)
            try:
                yield file
                file.close()
                part.chmod(0o644)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise


@contextmanager
def _drawing_errors(prediction: Prediction) -> Iterator[None]:
    try:
        yield
    except (ServeError, ValueError) as error:
        raise UndecodableFrame(f"cannot be drawn: {error}") from error


def _body(prediction: Prediction) -> Body:
    return prediction.frame.read() if prediction.body is None else prediction.body


def _is_cloud(answer: Mapping[str, Any]) -> bool:
    """Whether predictions are drawn into a point cloud; boxes in camera coordinates are drawn into the image."""
    return "pts_semantic_mask" in answer or ("bboxes_3d" in answer and answer.get("box_type_3d") != "Camera")
