"""Golden frames: what an archive is run on at conversion and again at every start of a worker.

Made, not recorded: the sample scene of the demonstration model for LiDAR, a drawn picture for cameras.
Knows nothing about models.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from serve.wire import FrameSpec

__all__ = ["golden_frame", "golden_picture"]


def golden_frame(spec: FrameSpec) -> tuple[str, bytes]:
    """File name and bytes of a frame of this kind, the same on every call.

    A cloud has x, y, z, intensity and zeros for whatever else the model's points carry.
    """
    if spec.modality == "image":
        encoded: npt.NDArray[np.uint8] = cv2.imencode(".png", golden_picture())[1]
        return "frame.png", encoded.tobytes()
    from serve.demo.scenes import sample_frame

    points = np.frombuffer(sample_frame(), dtype="<f4").reshape(-1, 4)
    wide = np.zeros((len(points), spec.load_dim), dtype="<f4")
    shared = min(4, spec.load_dim)
    wide[:, :shared] = points[:, :shared]
    return "frame.bin", wide.tobytes()


def golden_picture(width: int = 640, height: int = 480, seed: int = 8) -> npt.NDArray[np.uint8]:
    """(height, width, 3) uint8 BGR: a street of boxes under a sky, with noise, so that no region is flat."""
    rng = np.random.default_rng(seed)
    picture = np.empty((height, width, 3), dtype=np.float32)
    horizon = height * 2 // 5
    picture[:horizon] = np.linspace((230, 180, 120), (250, 225, 200), horizon)[:, None]
    picture[horizon:] = np.linspace((90, 95, 95), (60, 60, 65), height - horizon)[:, None]
    for _ in range(14):
        depth = rng.uniform(0.1, 1.0)
        w, h = (rng.uniform(0.5, 2.0) * 160 * depth, rng.uniform(0.5, 1.4) * 150 * depth)
        x = rng.uniform(0, width)
        foot = horizon + depth * (height - horizon) * 0.9
        x1, x2 = int(max(0, x - w / 2)), int(min(width, x + w / 2))
        y1, y2 = int(max(0, foot - h)), int(foot)
        picture[y1:y2, x1:x2] = rng.uniform(20, 235, 3)
        picture[y1 : y1 + max(2, (y2 - y1) // 3), x1:x2] *= 0.6
    picture += rng.normal(0, 6, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)
