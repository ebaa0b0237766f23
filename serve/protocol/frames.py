"""Frame decoding: bytes to arrays, with all checks.

A *frame* is the input of one inference: a point cloud as float32 (N, load_dim), an image as uint8 (H, W, 3) BGR, or
several such parts by name. Every mistake of a caller in these bytes raises a `ClientError`; limits are checked before
memory is allocated. `serve.protocol.frame_spec` describes the frames of a model.

Formats:

* ``.bin``: float32, little-endian, `load_dim` numbers per point, no header (KITTI, nuScenes).
* ``.npy``, ``.npz``, PCD, PLY, LAS, LAZ: columns by name or in the model's order (`serve.protocol.points`).
* Images of every format that OpenCV reads (`serve.protocol.images`).
* JSON calibrations, see `serve.protocol.calibration`; sweeps, see `serve.protocol.sweeps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import BadRequest, FrameTooLarge, UndecodableFrame
from serve.protocol.batch import Body, Bytes
from serve.protocol.calibration import parse_calibration
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frame_warnings import FrameWarning, check_points
from serve.protocol.images import decode_image
from serve.protocol.options import FrameOptions
from serve.protocol.points import decode_points
from serve.protocol.sweeps import Sweep, decode_sweeps, describe_lags, is_sweep_part, parse_sweeps
from serve.settings import Limits

__all__ = ["Frame", "decode_frame"]


@dataclass(frozen=True)
class Frame:
    """One decoded frame with its options.

    Attributes:
        data: (N, load_dim) float32 or (H, W[, 3]) uint8 BGR for a frame of one part; for several parts, a
            dictionary of such arrays by part name, with the calibration as `parse_calibration` returns it and the
            sweeps as `decode_sweeps` does.
        options: options of the frame.
        warnings: likely mistakes of the client.
        is_image: whether `data` is an image; a grey one may be float32 as points are.
    """

    data: npt.NDArray[Any] | dict[str, Any]
    options: FrameOptions
    warnings: tuple[FrameWarning, ...] = ()
    is_image: bool = False

    @property
    def points(self) -> npt.NDArray[np.float32] | None:
        """The point cloud among the parts, or None."""
        if isinstance(self.data, dict):
            return self.data.get("points")
        is_cloud = self.data.ndim == 2 and self.data.dtype == np.float32 and not self.is_image
        return self.data if is_cloud else None

    @property
    def has_no_points(self) -> bool:
        """Whether the frame has a point cloud, but neither it nor a sweep has points."""
        sweeps: tuple[Sweep, ...] = self.data.get("sweeps", ()) if isinstance(self.data, dict) else ()
        points = self.points
        return points is not None and not len(points) and not any(len(sweep.points) for sweep in sweeps)


def decode_frame(body: Body, spec: FrameSpec, options: FrameOptions, limits: Limits) -> Frame:
    """Decode one frame.

    Args:
        body: bytes of a frame of one part, or of each part by name.
        spec: frames that the model accepts.
        options: options of the frame.
        limits: limits; on bytes of all parts together, on points and pixels of each part.

    Raises:
        BadRequest: a part is missing or unexpected.
        FrameTooLarge: more bytes, points or pixels than `limits` allow.
        UndecodableFrame: the bytes are not a frame of this model.
        NonFinitePoints: the points contain NaN or inf.
    """
    size = sum(map(len, body.values())) if isinstance(body, Mapping) else len(body)
    if size > limits.max_frame_bytes:
        raise FrameTooLarge(
            f"the frame has {size} bytes, the limit is {limits.max_frame_bytes}; send a smaller one, or raise "
            "MMDET3D_SERVE_MAX_FRAME_BYTES"
        )
    if isinstance(body, Mapping):
        _check_parts(body, spec)
    elif len(spec.parts) > 1:
        raise BadRequest(f"this model takes {_format_parts(spec)}; send each as a form field of that name")
    else:
        body = {spec.parts[0]: body}
    if options.sweeps and (spec.sweeps is None or any(map(is_sweep_part, body))):
        raise BadRequest(
            "sweeps=accumulated is for points of several sweeps in one cloud; "
            + ("this model takes no sweeps" if spec.sweeps is None else "send these, or sweep.0, sweep.1, …")
        )
    decoded = {name: _decode_part(name, body[name], spec, options, limits) for name in spec.parts}
    warnings = check_points(decoded["points"], spec.expected) if spec.has_points else ()
    if spec.sweeps is not None:
        if any(map(is_sweep_part, body)):
            decoded["sweeps"] = decode_sweeps(
                body,
                spec.sweeps,
                limits,
                num_key_points=len(decoded["points"]),
                columns=options.columns,
                load_dim=None if options.load_dim is None else spec.sweeps.load_dim,
            )
            warnings += _warn_of_sweeps(body, spec)
        elif options.sweeps:
            warnings += _warn("sweep_times", describe_lags(decoded["points"][:, spec.sweeps.time_column]))
        else:
            warnings += spec.warnings
    if len(decoded) == 1:
        return Frame(decoded[spec.parts[0]], options, warnings, is_image=not spec.has_points)
    return Frame(decoded, options, warnings)


def _warn_of_sweeps(body: Mapping[str, Bytes], spec: FrameSpec) -> tuple[FrameWarning, ...]:
    assert spec.sweeps is not None
    poses = parse_sweeps(body["sweeps"])
    if not poses:
        return spec.warnings
    used = spec.sweeps.number
    ignored = (
        f"the model uses {used} sweeps; the latest of the {len(poses)} are used"
        if len(poses) > used
        else None
    )
    return (
        *_warn("sweeps_ignored", ignored),
        *_warn("sweep_times", describe_lags(np.array([pose.time_lag_s for pose in poses]))),
    )


def _warn(code: str, message: str | None) -> tuple[FrameWarning, ...]:
    return () if message is None else (FrameWarning(code, message),)


def _check_parts(body: Mapping[str, Bytes], spec: FrameSpec) -> None:
    missing = [name for name in spec.parts if name not in body]
    unexpected = [name[:80] for name in body if not spec.accepts(name)]
    if missing or unexpected:
        faults = [f"missing: {', '.join(missing)}"] if missing else []
        faults += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
        raise BadRequest(f"this model takes {_format_parts(spec)}; {'; '.join(faults)}")


def _format_parts(spec: FrameSpec) -> str:
    optional = ", and optionally sweep.0, sweep.1, … with sweeps" if spec.sweeps else ""
    return f"{'the parts ' if len(spec.parts) > 1 else 'one part, '}{', '.join(spec.parts)}{optional}"


def _decode_part(name: str, body: Bytes, spec: FrameSpec, options: FrameOptions, limits: Limits) -> Any:
    if name == "points":
        layout = spec.layout
        if options.sweeps and spec.sweeps:
            layout = spec.sweeps.accumulated(layout)
        return decode_points(
            body,
            layout,
            limits,
            columns=options.columns,
            load_dim=options.load_dim,
            num_points=options.num_points,
        )
    if name == "calibration":
        return parse_calibration(body, spec.calibration, spec.cameras)
    try:
        image = decode_image(body, spec.color_type, spec.decoder, limits.max_pixels)
        if spec.cameras and image.ndim != 3:
            raise UndecodableFrame("the image is grey; images of several cameras must have three channels")
        if spec.cameras and image.shape[2] != 3:
            raise UndecodableFrame(f"the image has {image.shape[2]} channels; three are expected")
    except UndecodableFrame as error:
        raise (UndecodableFrame(f"{name}: {error}") if spec.cameras else error) from None
    return image
