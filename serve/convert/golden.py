"""Golden frames: inputs that an archive is run on at conversion and at every start of a worker.

The frames are synthetic: the demo model's sample scene for LiDAR, a room for depth cameras, drawn images for
cameras, with calibrations under which point cloud and image point in the same direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import orjson

from serve.errors import ArchiveError
from serve.protocol.batch import Body
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.protocol.sweeps import is_sweep_part
from serve.settings import Limits

__all__ = ["golden_calibration", "golden_frame", "golden_image", "golden_room", "list_warnings", "read_frame"]

# Focal length of the drawn images; their principal point is the centre of 640 x 480.
FOCAL_PX = 520.0
# LiDAR (x forward, y left, z up) and depth camera (x right, y forward, z up) to camera (right, down, forward).
LIDAR_AXES = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
DEPTH_AXES = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
CAMERA_BELOW_LIDAR_M = 0.3
_SAMPLE = Path(__file__).parents[1] / "assets" / "sample.bin"


def golden_frame(spec: FrameSpec) -> dict[str, tuple[str, bytes]]:
    """File name and bytes of every part of a frame of this kind, the same on every call.

    A point cloud has x, y, z, intensity (colour for a depth camera) and zeros for any further column that the
    model expects.
    """
    parts: dict[str, tuple[str, bytes]] = {}
    for k, part in enumerate(name for name in spec.parts if name.startswith("image")):
        encoded: npt.NDArray[np.uint8] = cv2.imencode(".png", golden_image(seed=8 + k))[1]
        parts[part] = (f"{part}.png", encoded.tobytes())
    if spec.has_points:
        depth = spec.modality == "depth" or "depth2img" in spec.calibration
        cloud = golden_room() if depth else _read_sample_scene()
        parts["points"] = ("points.bin", _fit_columns(cloud, spec.load_dim).tobytes())
    if spec.calibration:
        parts["calibration"] = ("calibration.json", orjson.dumps(golden_calibration(spec)))
    if len(parts) == 1:
        ((part, (file, body)),) = parts.items()
        return {part: (f"frame{Path(file).suffix}", body)}
    return parts


def read_frame(path: Path, spec: FrameSpec) -> dict[str, tuple[str, bytes]]:
    """File name and bytes of every part of a frame on disk.

    Args:
        path: a file; for a frame of several parts a folder with one file per part, named after the part
            (``points.bin``, ``image.png``, ``image.CAM_FRONT.jpg``, ``calibration.json``; optionally
            ``sweep.0.bin``, …, ``sweeps.json``).
        spec: the parts that the model expects.

    Raises:
        ArchiveError: a part has no file, or more than one.
        OSError: a file cannot be read.
    """
    has_sweeps = spec.sweeps is not None and path.is_dir()
    if len(spec.parts) == 1 and not has_sweeps:
        return {spec.parts[0]: (f"frame{path.suffix}", path.read_bytes())}
    found: dict[str, tuple[str, bytes]] = {}
    own = sorted(file.stem for file in path.iterdir() if is_sweep_part(file.stem)) if has_sweeps else ()
    for part in (*spec.parts, *own):
        files = [file for file in sorted(path.iterdir()) if file.stem == part] if path.is_dir() else []
        if len(files) != 1:
            raise ArchiveError(
                f"{path} has {len(files) or 'no'} files {part}.*; a frame of this model is a folder with one file "
                f"for each of {', '.join(spec.parts)}"
            )
        found[part] = (files[0].name, files[0].read_bytes())
    return found


def list_warnings(frame: Body | None, spec: FrameSpec) -> tuple[str, ...]:
    """Return the warnings that concern every frame of a model, and those about a user's golden frame.

    Raises:
        ClientError: the frame is not one of this model.
    """
    found = spec.warnings
    if frame is not None:
        options = FrameOptions(
            num_points=0 if not frame else None, load_dim=spec.load_dim if spec.has_points else None
        )
        found += decode_frame(frame, spec, options, Limits()).warnings
    return tuple(dict.fromkeys(warning.message for warning in found))


def golden_calibration(spec: FrameSpec) -> dict[str, Any]:
    """Calibration of the drawn images as a JSON document; several cameras are spaced by equal yaw steps."""
    if not spec.cameras:
        return {name: matrix for name, matrix in _camera_matrices(0.0).items() if name in spec.calibration}
    # At most 60 degrees: rigs without a rear camera (Waymo's five) do not cover the full turn.
    step = 2 * np.pi / max(6, len(spec.cameras))
    return {
        camera: {
            name: matrix for name, matrix in _camera_matrices(k * step).items() if name in spec.calibration
        }
        for k, camera in enumerate(spec.cameras)
    }


def _camera_matrices(yaw_rad: float) -> dict[str, Any]:
    """Intrinsics and extrinsics of a camera turned by `yaw_rad` about z, (4, 4) each, as nested lists."""
    cam2img = np.eye(4)
    cam2img[0, 0] = cam2img[1, 1] = FOCAL_PX
    cam2img[:2, 2] = 320.0, 240.0
    rotation = np.eye(4)
    cosine, sine = np.cos(yaw_rad), np.sin(yaw_rad)
    rotation[:2, :2] = [[cosine, sine], [-sine, cosine]]
    lidar2cam = LIDAR_AXES @ rotation
    lidar2cam[1, 3] = -CAMERA_BELOW_LIDAR_M
    matrices: Mapping[str, npt.NDArray[np.float64]] = {
        "cam2img": cam2img,
        "lidar2cam": lidar2cam,
        "lidar2img": cam2img @ lidar2cam,
        "depth2img": cam2img @ DEPTH_AXES,
    }
    # Rounded: the last bits of a sine differ between processors.
    return {name: np.round(matrix, 9).tolist() for name, matrix in matrices.items()}


def _read_sample_scene() -> npt.NDArray[np.float32]:
    return np.frombuffer(_SAMPLE.read_bytes(), dtype="<f4").reshape(-1, 4)


def _fit_columns(cloud: npt.NDArray[np.float32], load_dim: int) -> npt.NDArray[np.float32]:
    """Cut or zero-pad the columns to `load_dim`."""
    wide = np.zeros((len(cloud), load_dim), dtype="<f4")
    shared = min(cloud.shape[1], load_dim)
    wide[:, :shared] = cloud[:, :shared]
    return wide


def golden_room(num_points: int = 8_000, seed: int = 8) -> npt.NDArray[np.float32]:
    """(num_points, 6) float32: x right, y forward, z up in metres, then red, green, blue 0 to 255.

    A floor, two walls and furniture-sized boxes, seen by a depth camera 1.2 m above the floor. The room measures
    2 x 2 m because some models slide a window over it in steps of 0.5 m.
    """
    rng = np.random.default_rng(seed)
    surfaces: list[tuple[Any, Any, Any, Any]] = [  # corner, two edges (metres), colour
        ((-1.0, 0.6, -1.2), (2.0, 0, 0), (0, 2.0, 0), (150, 120, 90)),
        ((-1.0, 2.6, -1.2), (2.0, 0, 0), (0, 0, 1.8), (200, 200, 190)),
        ((-1.0, 0.6, -1.2), (0, 2.0, 0), (0, 0, 1.8), (190, 200, 205)),
    ]
    for _ in range(5):
        width, depth, height = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.6), rng.uniform(0.4, 1.1)
        x, y = rng.uniform(-0.9, 0.9 - width), rng.uniform(0.8, 1.9)
        colour = rng.uniform(20, 235, 3)
        surfaces += [
            ((x, y, -1.2), (width, 0, 0), (0, 0, height), colour),
            ((x, y, -1.2), (0, depth, 0), (0, 0, height), colour),
            ((x, y, -1.2 + height), (width, 0, 0), (0, depth, 0), colour),
        ]
    areas = np.array([np.linalg.norm(np.cross(one, two)) for _, one, two, _ in surfaces])
    counts = rng.multinomial(num_points, areas / areas.sum())
    parts = []
    for (corner, one, two, colour), count in zip(surfaces, counts, strict=True):
        shares = rng.uniform(size=(count, 2))
        xyz = np.array(corner) + shares @ np.array([one, two]) + rng.normal(0, 0.004, (count, 3))
        parts.append(np.hstack([xyz, np.clip(np.array(colour) + rng.normal(0, 8, (count, 3)), 0, 255)]))
    return np.round(np.concatenate(parts), 4).astype(np.float32)


def golden_image(width: int = 640, height: int = 480, seed: int = 8) -> npt.NDArray[np.uint8]:
    """(height, width, 3) uint8 BGR: boxes on a street under a sky, with noise so that no region is constant."""
    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), dtype=np.float32)
    horizon = height * 2 // 5
    image[:horizon] = np.linspace((230, 180, 120), (250, 225, 200), horizon)[:, None]
    image[horizon:] = np.linspace((90, 95, 95), (60, 60, 65), height - horizon)[:, None]
    for _ in range(14):
        depth = rng.uniform(0.1, 1.0)
        w, h = (rng.uniform(0.5, 2.0) * 160 * depth, rng.uniform(0.5, 1.4) * 150 * depth)
        x = rng.uniform(0, width)
        foot = horizon + depth * (height - horizon) * 0.9
        x1, x2 = int(max(0, x - w / 2)), int(min(width, x + w / 2))
        y1, y2 = int(max(0, foot - h)), int(foot)
        image[y1:y2, x1:x2] = rng.uniform(20, 235, 3)
        image[y1 : y1 + max(2, (y2 - y1) // 3), x1:x2] *= 0.6
    image += rng.normal(0, 6, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)
