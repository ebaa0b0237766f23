"""Files that are made of the records of a run: Parquet and KITTI's labels part by part, COCO's results at the end.

    DEST/parquet/00000012.parquet       the frames of part 12, one row each (`serve.formats.parquet`)
    DEST/kitti/00000012.tar             NAME.txt of every answered frame of part 12
    DEST/kitti/00000012.errors.json     frames of it that have no label file, and why; absent if there are none
    DEST/coco.json, DEST/coco_ids.json  of the whole run, once all parts are there
    DEST/formats.json                   options that the files of each format were made with

The record ``parts/00000012.jsonl`` is written first, whatever the formats. The others are functions of it: they agree
with it and with each other, need no model, and can be made again when something ended before they were whole.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from serve import storage
from serve.bulk.destination import Destination
from serve.bulk.parts import frames_of
from serve.bulk.retry import repeat
from serve.client.frames import frame_parts
from serve.errors import BadRequest, ObjectNotFound, ServeError, StorageError, UriError, error_body
from serve.formats.coco import CocoIds
from serve.formats.kitti import Camera, check_boxes, format_labels
from serve.formats.parquet import load_pyarrow, write_parquet
from serve.predict.frames import Frame
from serve.predict.kitti import CameraFinder
from serve.predict.writers import write_results
from serve.protocol.batch import Body
from serve.storage.hashes import sha256_of

__all__ = [
    "COCO",
    "COCO_IDS",
    "FORMATS",
    "FORMATS_FILE",
    "KITTI_ERRORS",
    "PART_FORMATS",
    "Outputs",
    "check_outputs",
    "convert_part",
    "options_of",
    "write_coco",
]

#: Names of ``--format``.
FORMATS = ("jsonl", "parquet", "kitti", "coco")
#: Formats with a file per part, in a folder of their name, by the end of the file's name.
PART_FORMATS = {"parquet": ".parquet", "kitti": ".tar"}
COCO, COCO_IDS = "coco.json", "coco_ids.json"
KITTI_ERRORS = ".errors.json"
FORMATS_FILE = "formats.json"
_MOST_CAMERAS = 100  # that are looked for before a run
_MOST_DIGITS = 18  # of a number of 64 bits
_OF_THE_FRAME = (ObjectNotFound, UriError)  # other errors are those of the bucket
_CAMERA_PARTS = ("calibration", "image")


@dataclass(frozen=True)
class Outputs:
    """Formats of a run and what their files depend on besides the record.

    Attributes:
        formats: some of `FORMATS`.
        calibration: path or URI, as `CameraFinder` takes it.
        image_size: width and height of the images that KITTI's labels refer to, pixels.
        annotations: COCO annotation file with the ids of images and categories.
    """

    formats: tuple[str, ...] = ("jsonl",)
    calibration: str | None = None
    image_size: tuple[int, int] | None = None
    annotations: Path | None = None

    def options(self, name: str) -> dict[str, Any]:
        """Return what the files of a format depend on, for JSON."""
        if name == "kitti":
            size = None if self.image_size is None else list(self.image_size)
            return {"calibration": self.calibration, "image_size": size}
        if name == "coco":
            return {"annotations_sha256": None if self.annotations is None else sha256_of(self.annotations)}
        return {}


def options_of(destination: Destination) -> dict[str, Any]:
    """Return what the files of each format were made with, as `Outputs.options` says it."""
    known: dict[str, Any] = orjson.loads(destination.read(FORMATS_FILE) or b"{}")
    return known


def check_outputs(
    outputs: Outputs,
    classes: Sequence[str],
    answer: Mapping[str, Any],
    manifest: Path,
    destination: Destination,
) -> None:
    """Check before anything is computed that the formats can be written.

    Args:
        outputs: the formats.
        classes: of the model.
        answer: one of the model, which shows the kind of all.
        manifest: the frames of the run.
        destination: has the files of former runs.

    Raises:
        BadRequest: the model has other boxes, a file is missing, no frame has a camera, or the annotations lack an
            image or class.
        MissingPackage: pyarrow is not installed.
    """
    if "parquet" in outputs.formats:
        load_pyarrow()
    if "kitti" in outputs.formats:
        check_boxes(answer)
        is_current = options_of(destination).get("kitti") == outputs.options("kitti")
        if not (is_current and destination.finished("kitti", PART_FORMATS["kitti"])):
            _check_cameras(CameraFinder(outputs.calibration, outputs.image_size), answer, manifest)
    if "coco" in outputs.formats:
        if "bboxes" not in answer:
            kind = answer.get("box_type_3d")
            found = "labels" if kind is None else f"boxes of type {kind}"
            raise BadRequest(
                f"COCO's results hold boxes in images; this model gives {found}; choose jsonl, parquet or kitti"
            )
        ids = CocoIds(outputs.annotations)
        if outputs.annotations is not None:
            for label, name in enumerate(classes):
                ids.category(label, name, list(classes))
            _check_distinct(ids, manifest, outputs.annotations)


def _check_distinct(ids: CocoIds, manifest: Path, annotations: Path) -> None:
    """Check that the annotations have every image, and no two frames the same one."""
    frames: dict[Any, str] = {}
    for name in _names(manifest):
        if (other := frames.setdefault(ids.image(name), name)) != name:
            raise BadRequest(
                f"{other} and {name} are the same image for {annotations}; take a file whose file_name has their "
                "folders, or run them apart"
            )


def _check_cameras(cameras: CameraFinder, answer: Mapping[str, Any], manifest: Path) -> None:
    """Check that some frame has a camera, of as many as take little time: the first one has, as a rule."""
    missing: ServeError | None = None
    for line in _spread(manifest, _MOST_CAMERAS):
        (frame,) = frames_of([line])
        try:
            repeat(partial(_camera, cameras, frame, answer))
        except StorageError as error:
            if not isinstance(error, _OF_THE_FRAME):
                raise
            missing = missing or error
        except ServeError as error:
            missing = missing or error
        else:
            return
    if missing is not None:
        raise BadRequest(
            f"no frame has what KITTI's labels need, of up to {_MOST_CAMERAS} looked at: {missing}"
        )


def _spread(manifest: Path, most: int) -> Iterator[bytes]:
    """Yield lines of a manifest at equal distances, the first one at once."""
    with manifest.open("rb") as file:
        yield from itertools.islice(file, 1)
        count = 1 + sum(1 for _ in file)
        step = -(-count // most)
        file.seek(0)
        yield from itertools.islice(file, step, None, step)


def convert_part(
    destination: Destination,
    outputs: Outputs,
    name: str,
    number: int,
    lines: Sequence[bytes],
) -> None:
    """Write a format's file of a part from the part's record.

    Args:
        destination: has the record, takes the file.
        outputs: options of the format.
        name: of the format.
        number: of the part.
        lines: the part's lines of the manifest.

    Raises:
        ServeError: the destination cannot be written, or a bucket not be read.
    """
    with closing(destination.lines(destination.part_name(number))) as record:
        found = map(orjson.loads, record)
        if name == "parquet":
            with destination.writing(destination.format_name(name, number, PART_FORMATS[name])) as out:
                write_parquet(out, found)
            return
        cameras = CameraFinder(outputs.calibration, outputs.image_size)
        _write_labels(destination, number, zip(frames_of(lines), found, strict=True), cameras)


def _write_labels(
    destination: Destination,
    number: int,
    record: Iterator[tuple[Frame, Mapping[str, Any]]],
    cameras: CameraFinder,
) -> None:
    """Write the label files of a part as one tar file, which needs one request of a bucket and appears whole."""
    failed: list[tuple[Frame, ServeError]] = []
    with destination.writing(destination.format_name("kitti", number, PART_FORMATS["kitti"])) as out:
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as file:
            for frame, line in record:
                if (answer := line.get("answer")) is None:
                    continue
                try:
                    camera = repeat(partial(_camera, cameras, frame, answer))
                    labels = format_labels(answer, camera).encode()
                except StorageError as error:
                    if not isinstance(error, _OF_THE_FRAME):
                        raise  # the bucket: no property of the frame
                    failed.append((frame, error))
                except ServeError as error:
                    failed.append((frame, error))
                else:
                    _add(file, f"{frame.stem}.txt", labels)
        # Before the labels appear, so that what is missing among them is known.
        errors = destination.format_name("kitti", number, KITTI_ERRORS)
        if failed:
            listed = [{"frame": frame.name, **error_body(error)} for frame, error in failed]
            destination.write(errors, orjson.dumps(listed, option=orjson.OPT_INDENT_2))
        else:
            destination.remove(errors)


def _add(file: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without time and owner: the same labels are the same bytes
    entry.size = len(data)
    file.addfile(entry, io.BytesIO(data))


def _camera(cameras: CameraFinder, frame: Frame, answer: Mapping[str, Any]) -> Camera | None:
    return cameras.find(frame, _camera_parts(frame, answer), answer)


def _camera_parts(frame: Frame, answer: Mapping[str, Any]) -> Body:
    """Read the parts of a frame that say what its camera was; no point clouds."""
    if "bboxes_3d" not in answer:
        return b""
    files: Mapping[str, str | Path] = frame.origin if isinstance(frame.origin, Mapping) else {}
    if frame.path is not None and frame.path.is_dir():
        files = frame_parts(frame.path)
    parts = {part: storage.read_bytes(files[part]) for part in _CAMERA_PARTS if part in files}
    return parts or b""


class _ImageIds(CocoIds):
    """Ids that need no memory of the images before: the numbers of the names if they are distinct, else positions.

    Args:
        annotations: COCO annotation file with the ids, or None.
        manifest: the frames.
    """

    def __init__(self, annotations: Path | None, manifest: Path) -> None:
        super().__init__(annotations)
        self._has_numbers = annotations is None and _has_distinct_numbers(manifest)
        self._annotated = annotations is not None
        self.position = 0

    def image(self, name: str) -> Any:
        """Return the id of the frame at `position`."""
        if self._annotated:
            return super().image(name)
        return int(Path(name).stem) if self._has_numbers else self.position


def _has_distinct_numbers(manifest: Path) -> bool:
    """Whether the names are numbers, as COCO's own are, and no two the same; 8 bytes of memory for each."""
    numbers = array("q")
    for name in _names(manifest):
        stem = Path(name).stem
        if not (stem.isascii() and stem.isdecimal() and len(stem) <= _MOST_DIGITS):
            return False
        numbers.append(int(stem))
    found = np.frombuffer(numbers, np.int64)
    return len(np.unique(found)) == len(found)


def _names(manifest: Path) -> Iterator[str]:
    with manifest.open("rb") as file:
        for line in file:
            yield orjson.loads(line)["frame"]


def write_coco(destination: Destination, outputs: Outputs, manifest: Path, parts: int) -> None:
    """Write COCO's results of the whole run from its records, and before them the ids without an annotation file.

    Memory does not grow with the frames, but for 8 bytes of each.

    Args:
        destination: has all records, takes the files.
        outputs: options of the format.
        manifest: the frames.
        parts: number of parts.

    Raises:
        BadRequest: predictions are not boxes in images, or the annotation file lacks an image or class.
    """
    ids = _ImageIds(outputs.annotations, manifest)

    def records() -> Iterator[Mapping[str, Any]]:
        ids.position = -1
        for number in range(parts):
            with closing(destination.lines(destination.part_name(number))) as lines:
                for line in lines:
                    ids.position += 1
                    yield orjson.loads(line)

    with destination.writing(COCO) as file:
        write_results(file, records(), ids)
        # Before the results appear, which say that all is there.
        if outputs.annotations is None:
            with destination.writing(COCO_IDS) as listed:
                _write_ids(listed, ids, manifest)
        else:
            destination.remove(COCO_IDS)


def _write_ids(file: IO[bytes], ids: _ImageIds, manifest: Path) -> None:
    file.write(b'{"images":[')
    separator = b"\n"
    for position, name in enumerate(_names(manifest)):
        ids.position = position
        file.write(separator + orjson.dumps({"id": ids.image(name), "file_name": name}))
        separator = b",\n"
    categories = [{"id": number, "name": name} for number, name in sorted(ids.categories.items())]
    file.write(b'\n],"categories":' + orjson.dumps(categories) + b"}\n")
