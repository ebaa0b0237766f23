"""Recordings that viewers play: MCAP with Foxglove's schemas, and rerun's ``.rrd``.

Both are optional: ``pip install 'mmdet3d-serve[recordings]'`` for MCAP, ``'mmdet3d-serve[rerun]'`` for rerun. A clip
is a recording: point clouds and images as they were, boxes and titles above a score, at the times of the source.
"""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import MissingPackage
from serve.predict.frame_times import FrameTimes
from serve.predict.frames import Clip, Prediction
from serve.predict.scene import Boxes2D, Boxes3D, Shapes, shapes_of
from serve.predict.writers import Drawing, Writer
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.protocol.orientation import UPRIGHT, read_orientation
from serve.settings import Limits
from serve.storage.cache import map_disk_errors
from serve.visualize.detections import encode_png

__all__ = ["McapWriter", "RrdWriter"]

_SECOND_NS = 10**9
_FIRST_DATE_NS = 10**17  # 1973: times of a recording are dates, those of a video begin at 0


class RecordingWriter(Writer):
    """``CLIP.SUFFIX`` of every clip."""

    needs_body = True
    suffix = ""

    def __init__(self, folder: Path, drawing: Drawing, rate: Fraction, target: Path | None = None) -> None:
        """Write into `folder`, or the one clip into `target`; `rate` is that of frames without times."""
        self._folder, self._drawing, self._target = folder, drawing, target
        self._times, self._period = FrameTimes(rate), 1 / rate
        self._time = Fraction(0)
        self._clip: Clip | None = None
        self._part: Path | None = None
        self._path = Path()
        self._position = 0
        self._finished: list[Path] = []

    def write(self, prediction: Prediction, *, is_new: bool) -> None:
        """Append a frame; one that failed is left out, and its time passes."""
        frame = prediction.frame
        if frame.clip is not self._clip:
            self._close()
            self._clip, self._position = frame.clip, 0
            self._path = self._target or self._folder / f"{frame.clip.name}{self.suffix}"
            self._time = -self._period
        self._position += 1
        time = self._times.next(frame)
        self._time = self._time + self._period if time is None else time
        if prediction.answer is None:
            return
        drawing = self._drawing
        shapes = shapes_of(
            prediction, load_dim=drawing.load_dim, columns=drawing.columns, score_thr=drawing.score_thr
        )
        time_ns = round(self._time * _SECOND_NS)
        with map_disk_errors(str(self._path)):
            if self._part is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                handle, part = tempfile.mkstemp(
                    dir=self._path.parent, prefix=f".{self._path.stem}.", suffix=self.suffix
                )
                os.close(handle)
                self._part = Path(part)
                self.open(self._part, frame.clip.name)
            self.append(shapes, max(time_ns, 0), prediction)

    def finish(self, record: Iterable[Mapping[str, Any]]) -> list[Path]:
        """Finish the last recording."""
        self._close()
        return self._finished

    def abort(self) -> None:
        """Remove the unfinished recording."""
        if self._part is not None:
            self.close()
            self._part.unlink(missing_ok=True)
            self._part = None

    def _close(self) -> None:
        if self._part is None:
            return
        with map_disk_errors(str(self._path)):
            self.close()
            self._part.chmod(0o644)
            self._part.replace(self._path)
        self._part = None
        self._finished.append(self._path)

    @abstractmethod
    def open(self, path: Path, name: str) -> None:
        """Begin a file."""

    @abstractmethod
    def append(self, shapes: Shapes, time_ns: int, prediction: Prediction) -> None:
        """Write one frame at a time in nanoseconds."""

    @abstractmethod
    def close(self) -> None:
        """End the file."""


class McapWriter(RecordingWriter):
    """MCAP with protobuf messages of Foxglove's schemas.

    Topics: ``/points`` (PointCloud), ``/image`` (CompressedImage), ``/detections`` (SceneUpdate), ``/annotations``
    (ImageAnnotations).
    """

    suffix = ".mcap"

    def __init__(self, folder: Path, drawing: Drawing, rate: Fraction, target: Path | None = None) -> None:
        """See the base.

        Raises:
            MissingPackage: a package is not installed.
        """
        try:
            import foxglove_schemas_protobuf
            import mcap_protobuf.writer
        except ImportError as error:
            raise MissingPackage(
                "MCAP recordings need mcap-protobuf-support and foxglove-schemas-protobuf: "
                "pip install 'mmdet3d-serve[recordings]'"
            ) from error
        del foxglove_schemas_protobuf
        self._module = mcap_protobuf.writer
        super().__init__(folder, drawing, rate, target)

    def open(self, path: Path, name: str) -> None:
        """Begin a file."""
        self._file = path.open("wb")
        self._writer = self._module.Writer(self._file)

    def close(self) -> None:
        """Write the summary."""
        self._writer.finish()
        self._file.close()

    def append(self, shapes: Shapes, time_ns: int, prediction: Prediction) -> None:
        """Write the messages of one frame."""
        from google.protobuf.timestamp_pb2 import Timestamp

        stamp = Timestamp(seconds=time_ns // _SECOND_NS, nanos=time_ns % _SECOND_NS)
        messages = {
            "/points": _point_cloud(shapes, stamp),
            "/image": _compressed_image(shapes, stamp),
            "/detections": _scene_update(shapes.boxes_3d, shapes.frame_id, stamp),
            "/annotations": _annotations(shapes.boxes_2d, stamp),
        }
        for topic, message in messages.items():
            if message is not None:
                self._writer.write_message(topic, message, log_time=time_ns, publish_time=time_ns)


def _point_cloud(shapes: Shapes, stamp: Any) -> Any:
    if shapes.points is None:
        return None
    from foxglove_schemas_protobuf.PackedElementField_pb2 import PackedElementField
    from foxglove_schemas_protobuf.PointCloud_pb2 import PointCloud

    columns = shapes.points.shape[1]
    names = ["x", "y", "z", "intensity", *(f"column{k}" for k in range(4, columns))][:columns]
    return PointCloud(
        timestamp=stamp,
        frame_id=shapes.frame_id,
        pose=_pose((0, 0, 0), (0, 0, 0, 1)),
        point_stride=4 * columns,
        fields=[
            PackedElementField(name=name, offset=4 * k, type=PackedElementField.FLOAT32)
            for k, name in enumerate(names)
        ],
        data=np.ascontiguousarray(shapes.points, "<f4").tobytes(),
    )


def _compressed_image(shapes: Shapes, stamp: Any) -> Any:
    if shapes.image is None:
        return None
    from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage

    image, kind = _viewable(shapes.image)
    return CompressedImage(timestamp=stamp, frame_id="image", data=image, format=kind)


def _viewable(image: bytes) -> tuple[bytes, str]:
    """Return an image as JPEG or PNG, which every viewer shows, and its format.

    One that EXIF turns is written as the model saw it: some viewers turn it too, others do not.
    """
    if read_orientation(image) == UPRIGHT:
        if image.startswith(b"\xff\xd8"):
            return image, "jpeg"
        if image.startswith(b"\x89PNG"):
            return image, "png"
    decoded = decode_frame(image, FrameSpec("image"), FrameOptions(), Limits()).data
    return encode_png(np.asarray(decoded, np.uint8)), "png"


def _scene_update(boxes: Boxes3D | None, frame_id: str, stamp: Any) -> Any:
    """Make the scene of one frame: it replaces that of the frame before."""
    if boxes is None:
        return None
    from foxglove_schemas_protobuf.CubePrimitive_pb2 import CubePrimitive
    from foxglove_schemas_protobuf.KeyValuePair_pb2 import KeyValuePair
    from foxglove_schemas_protobuf.SceneEntity_pb2 import SceneEntity
    from foxglove_schemas_protobuf.SceneEntityDeletion_pb2 import SceneEntityDeletion
    from foxglove_schemas_protobuf.SceneUpdate_pb2 import SceneUpdate
    from foxglove_schemas_protobuf.TextPrimitive_pb2 import TextPrimitive
    from foxglove_schemas_protobuf.Vector3_pb2 import Vector3

    entities = []
    for k, title in enumerate(boxes.titles):
        pose = _pose(boxes.centres[k], boxes.quaternions[k])
        length, width, height = boxes.sizes[k].tolist()
        colour = boxes.colours[k]
        above = boxes.centres[k] + ((0, 0, height / 2 + 0.3) if frame_id != "camera" else (0, -width / 2, 0))
        entities.append(
            SceneEntity(
                timestamp=stamp,
                frame_id=frame_id,
                id=f"track {boxes.ids[k]}" if boxes.ids[k] > 0 else f"detection {k}",
                metadata=[KeyValuePair(key="class", value=boxes.names[k])],
                cubes=[
                    CubePrimitive(
                        pose=pose, size=Vector3(x=length, y=width, z=height), color=_colour(colour, 0.35)
                    )
                ],
                texts=[
                    TextPrimitive(
                        pose=_pose(above, (0, 0, 0, 1)),
                        billboard=True,
                        font_size=14,
                        scale_invariant=True,
                        color=_colour(colour, 1.0),
                        text=title,
                    )
                ],
            )
        )
    gone = SceneEntityDeletion(timestamp=stamp, type=SceneEntityDeletion.ALL)
    return SceneUpdate(deletions=[gone], entities=entities)


def _annotations(boxes: Boxes2D | None, stamp: Any) -> Any:
    if boxes is None:
        return None
    from foxglove_schemas_protobuf.ImageAnnotations_pb2 import ImageAnnotations
    from foxglove_schemas_protobuf.Point2_pb2 import Point2
    from foxglove_schemas_protobuf.PointsAnnotation_pb2 import PointsAnnotation
    from foxglove_schemas_protobuf.TextAnnotation_pb2 import TextAnnotation

    outlines, texts = [], []
    for (x1, y1, x2, y2), title, colour in zip(
        boxes.corners.tolist(), boxes.titles, boxes.colours, strict=True
    ):
        corners = [Point2(x=x, y=y) for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]
        outlines.append(
            PointsAnnotation(
                timestamp=stamp,
                type=PointsAnnotation.LINE_LOOP,
                points=corners,
                outline_color=_colour(colour, 1.0),
                thickness=2,
            )
        )
        texts.append(
            TextAnnotation(
                timestamp=stamp,
                position=Point2(x=x1, y=y1),
                text=title,
                font_size=14,
                text_color=_colour(np.zeros(3, np.uint8), 1.0),
                background_color=_colour(colour, 0.8),
            )
        )
    return ImageAnnotations(points=outlines, texts=texts)


def _pose(place: Any, turn: Any) -> Any:
    from foxglove_schemas_protobuf.Pose_pb2 import Pose
    from foxglove_schemas_protobuf.Quaternion_pb2 import Quaternion
    from foxglove_schemas_protobuf.Vector3_pb2 import Vector3

    return Pose(
        position=Vector3(**dict(zip("xyz", map(float, place), strict=True))),
        orientation=Quaternion(**dict(zip("xyzw", map(float, turn), strict=True))),
    )


def _colour(colour: Any, alpha: float) -> Any:
    from foxglove_schemas_protobuf.Color_pb2 import Color

    red, green, blue = (float(value) / 255 for value in colour)
    return Color(r=red, g=green, b=blue, a=alpha)


class RrdWriter(RecordingWriter):
    """rerun's recording, on the timelines ``time`` (a date, or since the begin of a video) and ``frame``."""

    suffix = ".rrd"

    def __init__(self, folder: Path, drawing: Drawing, rate: Fraction, target: Path | None = None) -> None:
        """See the base.

        Raises:
            MissingPackage: rerun is not installed.
        """
        try:
            import rerun
        except ImportError as error:
            raise MissingPackage(
                "rerun's recordings need rerun-sdk, which is not installed: pip install 'mmdet3d-serve[rerun]'"
            ) from error
        self._rerun: Any = rerun
        super().__init__(folder, drawing, rate, target)

    def open(self, path: Path, name: str) -> None:
        """Begin a file."""
        self._stream = self._rerun.RecordingStream("mmdet3d-serve", recording_id=name)
        self._stream.save(str(path))

    def close(self) -> None:
        """Write what is held back."""
        self._stream.flush()
        self._stream.disconnect()

    def append(self, shapes: Shapes, time_ns: int, prediction: Prediction) -> None:
        """Log one frame."""
        rr, stream = self._rerun, self._stream
        if time_ns >= _FIRST_DATE_NS:
            stream.set_time("time", timestamp=np.datetime64(time_ns, "ns"))
        else:
            stream.set_time("time", duration=np.timedelta64(time_ns, "ns"))
        stream.set_time("frame", sequence=self._position - 1)
        if shapes.points is not None:
            stream.log(shapes.frame_id, _axes(rr, shapes.frame_id), static=True)
            stream.log(f"{shapes.frame_id}/points", rr.Points3D(shapes.points[:, :3]))
        if shapes.image is not None:
            image, kind = _viewable(shapes.image)
            stream.log("image", rr.EncodedImage(contents=image, media_type=f"image/{kind}"))
        if (boxes := shapes.boxes_3d) is not None:
            stream.log(
                f"{shapes.frame_id}/detections",
                rr.Boxes3D(
                    centers=boxes.centres,
                    sizes=boxes.sizes,
                    quaternions=boxes.quaternions,
                    labels=boxes.titles,
                    colors=boxes.colours,
                ),
            )
        if (flat := shapes.boxes_2d) is not None:
            stream.log(
                "image/detections",
                rr.Boxes2D(
                    array=flat.corners,
                    array_format=rr.Box2DFormat.XYXY,
                    labels=flat.titles,
                    colors=flat.colours,
                ),
            )
        stream.log("log", rr.TextLog(prediction.frame.name))


def _axes(rr: Any, frame_id: str) -> Any:
    if frame_id == "camera":
        return rr.ViewCoordinates.RDF
    return rr.ViewCoordinates.RFU if frame_id == "depth" else rr.ViewCoordinates.FLU
