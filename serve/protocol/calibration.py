"""Calibrations from JSON with OpenMMLab's names to checked matrices.

One camera: ``{"cam2img": [[…]], "lidar2cam": [[…]], …}``; several: the same per camera, ``{"CAM_FRONT": {…}, …}``.
Matrices are nested lists, row by row, and act on column vectors from the left, as in the annotation files of
MMDetection3D (`mmdet3d.datasets.Det3DDataset`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import BadRequest, FrameTooLarge, UndecodableFrame
from serve.protocol.json_reader import JsonBounds, read_json

__all__ = ["MATRICES", "MAX_CALIBRATION_BYTES", "Calibration", "parse_calibration"]

Calibration = dict[str, npt.NDArray[np.float64]]

_PROJECTION = ((3, 3), (3, 4), (4, 4))
# Name → allowed shapes. Projections map metres to pixels, the others one coordinate frame (metres) to another.
MATRICES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "cam2img": _PROJECTION,
    "lidar2cam": ((4, 4),),
    "lidar2img": ((3, 4), (4, 4)),
    "depth2img": _PROJECTION,
}
MAX_CALIBRATION_BYTES = 1 << 20  # a dozen cameras need a few kilobytes
_BOUNDS = JsonBounds(max_values=20_000, max_bytes=MAX_CALIBRATION_BYTES, max_depth=4)
# Focal lengths and principal points are thousands of pixels; larger entries are misread bytes.
_MAX_ENTRY = 1e9


def parse_calibration(
    body: bytes | bytearray | memoryview, needed: Sequence[str], cameras: Sequence[str] = ()
) -> Calibration | dict[str, Calibration]:
    """Parse and check a calibration.

    Args:
        body: JSON, UTF-8.
        needed: names of the required matrices. ``lidar2img`` may be missing if ``cam2img`` and ``lidar2cam`` are
            given: it is their product.
        cameras: names of the cameras in the model's order; empty for a model with one camera.

    Returns:
        Matrices by name, or by camera and name; float64, of the shape that was sent.

    Raises:
        FrameTooLarge: more than `MAX_CALIBRATION_BYTES`, or 20,000 values.
        UndecodableFrame: the document is invalid; the message names the matrix and what is expected.
    """
    if len(body) > MAX_CALIBRATION_BYTES:
        raise FrameTooLarge(
            f"the calibration has {len(body)} bytes, the limit is {MAX_CALIBRATION_BYTES}; send matrices only"
        )
    try:
        document = read_json(body, _BOUNDS)
    except BadRequest as error:
        raise UndecodableFrame(f"the calibration cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise UndecodableFrame("the calibration must be a JSON object of matrices by name")
    if not cameras:
        return _parse_camera(document, needed, "the calibration")
    if set(document) != set(cameras):
        raise UndecodableFrame(
            f"the calibration has the cameras {_shorten(document)}; this model needs exactly {', '.join(cameras)}"
        )
    return {
        camera: _parse_camera(document[camera], needed, f"the calibration of {camera}") for camera in cameras
    }


def _parse_camera(document: Any, needed: Sequence[str], what: str) -> Calibration:
    if not isinstance(document, dict):
        raise UndecodableFrame(f"{what} must be a JSON object of matrices by name")
    unknown = [name for name in document if name not in MATRICES]
    if unknown:
        raise UndecodableFrame(
            f"{what} has unknown matrices {_shorten(unknown)}; known: {', '.join(MATRICES)}"
        )
    found = {
        name: _parse_matrix(value, MATRICES[name], f"{name} of {what}") for name, value in document.items()
    }
    if "lidar2img" in needed and "lidar2img" not in found and {"cam2img", "lidar2cam"} <= set(found):
        projection = np.eye(4)
        rows, columns = found["cam2img"].shape
        projection[:rows, :columns] = found["cam2img"]
        found["lidar2img"] = projection @ found["lidar2cam"]
    missing = [name for name in needed if name not in found]
    if missing:
        raise UndecodableFrame(f"{what} lacks {', '.join(missing)}; this model needs {', '.join(needed)}")
    return found


def _parse_matrix(value: Any, shapes: tuple[tuple[int, int], ...], what: str) -> npt.NDArray[np.float64]:
    expected = " or ".join(f"{rows} x {columns}" for rows, columns in shapes)
    # Checked before the conversion, because numpy accepts ragged, nested or textual lists in its own ways.
    fits = isinstance(value, list) and all(isinstance(row, list) for row in value)
    if not fits or not any(
        len(value) == rows and all(len(row) == columns for row in value) for rows, columns in shapes
    ):
        raise UndecodableFrame(f"{what} must be a list of rows, {expected}")
    if not all(
        isinstance(entry, int | float) and not isinstance(entry, bool) and -_MAX_ENTRY <= entry <= _MAX_ENTRY
        for row in value
        for entry in row
    ):
        raise UndecodableFrame(f"{what} must hold finite numbers (at most {_MAX_ENTRY:g})")
    return np.asarray(value, dtype=np.float64)


def _shorten(names: Any) -> str:
    shown = [str(name)[:40] for name in names][:6]
    return ", ".join(shown) + (", …" if len(names) > 6 else "") if shown else "nothing"
