r"""Auto-annotation function for CVAT: a module for ``cvat-cli`` and for `cvat_sdk.auto_annotation`.

    cvat-cli task auto-annotate 137 --function-module serve.labelling.cvat \
        -p address=str:127.0.0.1:8000 -p model=str:faster-rcnn --allow-unmatched-labels

CVAT's client reads the images and sends them here; no URL is read. `annotate_clouds` is for tasks in 3D, of which
CVAT's own driver knows nothing. Needs the package cvat-sdk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from serve.client import Client, Result, encode_image
from serve.errors import BadRequest, MissingPackage, NotReady, ServeError, SettingsError
from serve.labelling.masks import cvat_mask, polygons

if TYPE_CHECKING:
    import PIL.Image

try:
    import cvat_sdk.auto_annotation as cvataa
    from cvat_sdk import models
    from cvat_sdk.core.proxies.annotations import AnnotationUpdateAction
except ImportError as error:
    raise MissingPackage(
        "labelling in CVAT needs the package cvat-sdk: pip install 'mmdet3d-serve[cvat]'"
    ) from error

__all__ = ["CvatFunction", "annotate_clouds", "create", "cuboids"]

Shapes = Literal["rectangle", "mask", "polygon"]
_CUBOID_LABELS = ("any", "cuboid")  # types of labels that take cuboids
_CUBOID_POINTS = 16  # of CVAT's cuboid in 3D; the last seven are unused


class CvatFunction:
    """A served model as a detection function of CVAT: boxes, masks or polygons in 2D."""

    def __init__(
        self,
        address: str,
        model: str,
        version: str | None = None,
        *,
        shapes: Shapes = "rectangle",
        score_thr: float = 0.3,
        api_key_file: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """Connect, and read the model's classes, which are the labels of the function.

        Args:
            address: of the gateway.
            model: name of the served model, one for images.
            version: its version; the default one if None.
            shapes: what is annotated; for masks and polygons the model must have masks.
            score_thr: lowest score, unless CVAT names one.
            api_key_file: file with the gateway's API key.
            timeout_s: deadline of one image, seconds.

        Raises:
            SettingsError: the model is none for images, or `shapes` is unknown.
            NotReady: the model is loading.
            ServeError: as `Client.describe`.
        """
        if shapes not in ("rectangle", "mask", "polygon"):
            raise SettingsError(f"shapes must be rectangle, mask or polygon, not {shapes!r}")
        token = None if api_key_file is None else Path(api_key_file).read_text().strip()
        self._client = Client(address, token=token, timeout_s=timeout_s)
        self._model, self._version = model, version
        self._shapes = shapes
        self._score_thr = score_thr
        try:
            classes = _classes(self._client, model, version)
        except ServeError:
            self._client.close()
            raise
        self._ids = {name: i for i, name in enumerate(classes)}
        self._spec = cvataa.DetectionFunctionSpec(
            labels=[cvataa.label_spec(name, i, type=shapes) for name, i in self._ids.items()]
        )

    def close(self) -> None:
        """Close the connections to the gateway; ``cvat-cli`` ends without it."""
        self._client.close()

    @property
    def spec(self) -> cvataa.DetectionFunctionSpec:
        """The labels."""
        return self._spec

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: PIL.Image.Image
    ) -> list[models.LabeledShapeRequest]:
        """Annotate one image.

        Raises:
            BadRequest: masks are asked of a model that has none.
            ServeError: as `Client.predict`.
        """
        threshold = self._score_thr if context.conf_threshold is None else context.conf_threshold
        pixels = _pixels(image)
        size = (pixels.shape[1], pixels.shape[0])
        result = self._client.predict(
            encode_image(pixels, "rgb"), self._model, self._version, score_thr=threshold
        )
        if self._shapes == "rectangle":
            clipped = [_clip(box, size) for box in result.boxes.tolist()]
            return [
                cvataa.rectangle(self._ids[name], box)
                for name, box in zip(result.names, clipped, strict=True)
                if box[0] < box[2] and box[1] < box[3]  # not beside the image
            ]
        if "masks" not in result:
            raise BadRequest(f"model {self._model!r} has no masks; use shapes=rectangle")
        is_polygon = self._shapes == "polygon" or context.conv_mask_to_poly
        return list(self._outlines(result) if is_polygon else self._masks(result))

    def _masks(self, result: Result) -> Iterator[models.LabeledShapeRequest]:
        for name, mask in zip(result.names, result.masks, strict=True):
            if points := cvat_mask(mask):
                yield cvataa.mask(self._ids[name], points)

    def _outlines(self, result: Result) -> Iterator[models.LabeledShapeRequest]:
        for name, mask in zip(result.names, result.masks, strict=True):
            for outline in polygons(mask):
                yield cvataa.polygon(self._ids[name], (outline + 0.5).ravel().tolist())


create = CvatFunction


def cuboids(result: Result, label_ids: Mapping[str, int], frame: int = 0) -> list[models.LabeledShapeRequest]:
    """Return boxes in 3D as CVAT's cuboids.

    Args:
        result: answer of a model of point clouds, boxes (N, 7 or 9) x, y, z of the bottom centre, dx, dy, dz, yaw.
        label_ids: id of each label in the CVAT task; boxes of other classes are left out.
        frame: number of the frame.

    Returns:
        Cuboids of 16 points: centre, rotations about x, y and z in radians, lengths along them, seven zeros.

    Raises:
        BadRequest: the boxes are not in the coordinates of the point cloud.
    """
    if result.box_type not in ("LiDAR", "Depth"):
        raise BadRequest(f"boxes in {result.box_type or '2D'} coordinates are no cuboids of a point cloud")
    found = []
    for name, box in zip(result.names, result.boxes.tolist(), strict=True):
        if name in label_ids:
            x, y, z, dx, dy, dz, yaw = box[:7]
            points = [x, y, z + dz / 2, 0.0, 0.0, yaw, dx, dy, dz]
            points += [0.0] * (_CUBOID_POINTS - len(points))
            found.append(
                models.LabeledShapeRequest(
                    type="cuboid", label_id=label_ids[name], frame=frame, points=points, source="auto"
                )
            )
    return found


def annotate_clouds(
    task: Any,
    client: Client,
    model: str,
    version: str | None = None,
    *,
    score_thr: float = 0.3,
) -> int:
    """Add the cuboids of every point cloud of a CVAT task in 3D to its annotations; returns how many.

    As with CVAT's own driver, frames that are deleted from the task are left out, and so are labels that take other
    shapes.

    Args:
        task: task of `cvat_sdk.core` (``cvat_client.tasks.retrieve(ID)``).
        client: connected to the gateway.
        model: name of the served model.
        version: its version; the default one if None.
        score_thr: lowest score.

    Raises:
        ServeError: as `Client.predict`.
    """
    label_ids = {label.name: label.id for label in task.get_labels() if str(label.type) in _CUBOID_LABELS}
    deleted = set(task.get_meta().deleted_frames)
    shapes: list[models.LabeledShapeRequest] = []
    for number in sorted(set(range(task.size)) - deleted):
        cloud = task.get_frame(number, quality="original").read()
        result = client.predict(cloud, model, version, score_thr=score_thr)
        shapes += cuboids(result, label_ids, number)
    task.update_annotations(
        models.PatchedLabeledDataRequest(shapes=shapes), action=AnnotationUpdateAction.CREATE
    )
    return len(shapes)


def _classes(client: Client, model: str, version: str | None) -> Sequence[str]:
    """Return the classes of a model for images."""
    described = client.describe(model, version)
    if described is None:
        raise SettingsError("the address is that of TorchServe; labelling needs the gateway's")
    if "modality" not in described:
        raise NotReady(f"model {model!r} is {described.get('status', 'loading')}; try again later")
    if described["modality"] != "image":
        raise SettingsError(f"model {model!r} takes {described['modality']} frames; name one for images")
    return [str(name) for name in described["classes"]]


def _pixels(image: PIL.Image.Image) -> NDArray[np.uint8]:
    """Return the pixels as CVAT shows and OpenCV reads them, (H, W, 3) RGB: turned by EXIF, of 16 bits the upper 8."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # integers of 16 bits, which Pillow's own conversion cuts off at 255
        grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(upright.convert("RGB"))


def _clip(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Clip a box (x1, y1, x2, y2) to the image."""
    width, height = size
    return [min(max(value, 0.0), float(limit)) for value, limit in zip(box, (width, height) * 2, strict=True)]
