"""Loading steps of a user, each derived from one of upstream's."""

from __future__ import annotations

from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.registry import TRANSFORMS as IMAGE_STEPS
from mmdet3d.datasets.transforms import (
    LoadImageFromFileMono3D,
    LoadMultiViewImageFromFiles,
    LoadPointsFromFile,
    LoadPointsFromMultiSweeps,
)
from mmdet3d.registry import TRANSFORMS as CLOUD_STEPS
from mmengine.fileio import get


@CLOUD_STEPS.register_module()
class ClippedPoints(LoadPointsFromFile):
    """Set its own columns, clip what the base reads, and move what it returns."""

    def __init__(self, high: float = 0.5) -> None:
        super().__init__(coord_type="LIDAR", load_dim=5, use_dim=4)
        self.high = high

    def _load_points(self, name: Any) -> np.ndarray:
        points = super()._load_points(name).reshape(-1, self.load_dim).copy()
        points[:, 3] = np.clip(points[:, 3], 0, self.high)
        return points

    def transform(self, results: dict) -> dict:
        results = super().transform(results)
        results["points"].tensor[:, 2] += 0.1
        return results


@CLOUD_STEPS.register_module()
class FileOfMyOwn(LoadPointsFromFile):
    """Read the file without the base."""

    def _load_points(self, name: Any) -> np.ndarray:
        return np.fromfile(name, np.float32)


@CLOUD_STEPS.register_module()
class NearSweeps(LoadPointsFromMultiSweeps):
    """Use three sweeps, without what is near."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(sweeps_num=3, remove_close=True, test_mode=True, **settings)

    def transform(self, results: dict) -> dict:
        results = super().transform(results)
        results["points"] = results["points"][results["points"].tensor[:, 0] > 5]
        return results


@CLOUD_STEPS.register_module()
class BrightViews(LoadMultiViewImageFromFiles):
    """Brighten the images of all cameras."""

    def transform(self, results: dict) -> dict:
        results = super().transform(results)
        results["img"] = [cv2.add(image, 20) for image in results["img"]]
        return results


@CLOUD_STEPS.register_module()
class MirroredMono(LoadImageFromFileMono3D):
    """Mirror the image of one camera."""

    def transform(self, results: dict) -> dict:
        results = super().transform(results)
        results["img"] = np.ascontiguousarray(results["img"][:, ::-1])
        return results


@IMAGE_STEPS.register_module()
class GreyImage(LoadImageFromFile):
    """Read a grey image, of which every channel is the same."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(color_type="grayscale", **settings)

    def transform(self, results: dict) -> dict:
        results = super().transform(results)
        results["img"] = np.repeat(results["img"][..., None], 3, axis=-1)
        return results


@IMAGE_STEPS.register_module()
class DecodedByMe(LoadImageFromFile):
    """Read and decode the file without the base."""

    def transform(self, results: dict) -> dict:
        results["img"] = mmcv.imfrombytes(get(results["img_path"]))
        results["img_shape"] = results["ori_shape"] = results["img"].shape[:2]
        return results


@IMAGE_STEPS.register_module()
class BoxesOfMine(LoadAnnotations):
    """Read annotations, which a server has not."""
