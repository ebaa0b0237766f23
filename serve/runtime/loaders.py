"""The first steps of test pipelines, fed from memory: what upstream's loaders make of files, made of frames.

Each takes the configured step and gives a transform that leaves in the results what the step it stands for
would. Knows nothing about bytes, and not which loader a model needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["image_loader", "mono_loader", "multiview_loader", "point_loader"]


def point_loader(step: Mapping[str, Any]) -> Any:
    """mmdet3d's own loader with the file read taken out: use_dim, shift_height and the rest stay its business."""
    from mmdet3d.datasets.transforms import LoadPointsFromFile

    class LoadPointsFromFrame(LoadPointsFromFile):  # type: ignore[misc]
        def _load_points(self, frame: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            # The pipeline may write into its points; the frame belongs to the caller.
            return frame.copy()

    arguments = {
        key: value for key, value in step.items() if key not in ("type", "backend_args", "file_client_args")
    }
    return LoadPointsFromFrame(**arguments)


def image_loader(step: Mapping[str, Any]) -> Any:
    """Mmdet's loader for arrays, in place of the one for files."""
    from mmdet.datasets.transforms import LoadImageFromNDArray

    return LoadImageFromNDArray(to_float32=bool(step.get("to_float32", False)))


class _MonoLoader:
    """An image and its camera; `mmdet3d.datasets.LoadImageFromFileMono3D` keeps the camera as nested lists."""

    def __init__(self, load: Any) -> None:
        self._load = load

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load the image and spell out the camera."""
        results["cam2img"] = results["cam2img"].tolist()
        loaded: dict[str, Any] = self._load(results)
        return loaded


def mono_loader(step: Mapping[str, Any]) -> Any:
    """An image with ``cam2img`` beside it."""
    return _MonoLoader(image_loader(step))


class _MultiViewLoader:
    """Images of several cameras, made one size by zeros to the right and below, as upstream does."""

    def __init__(self, step: Mapping[str, Any]) -> None:
        self._to_float32 = bool(step.get("to_float32", False))
        self._scaled = bool(step.get("set_default_scale", True))
        self._num_views = int(step.get("num_views", 5))
        self._num_ref_frames = int(step.get("num_ref_frames", -1))

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Put images, cameras and their common size where the rest of the pipeline looks."""
        cameras = list(results["images"].values())
        height, width = (max(camera["img"].shape[axis] for camera in cameras) for axis in (0, 1))
        pictures = []
        for camera in cameras:
            picture = np.zeros((height, width, 3), dtype=np.float32 if self._to_float32 else np.uint8)
            image = camera.pop("img")
            picture[: image.shape[0], : image.shape[1]] = image
            pictures.append(picture)
        for name in ("cam2img", "lidar2cam"):
            results[name] = [camera[name] for camera in cameras]
        results["ori_cam2img"] = [camera["cam2img"].copy() for camera in cameras]
        results["img"] = pictures
        results["filename"] = [None] * len(pictures)
        for name in ("img_shape", "ori_shape", "pad_shape"):
            results[name] = (height, width)
        if self._scaled:
            results["scale_factor"] = 1.0
        results["img_norm_cfg"] = {
            "mean": np.zeros(3, dtype=np.float32),
            "std": np.ones(3, dtype=np.float32),
            "to_rgb": False,
        }
        results["num_views"] = self._num_views
        results["num_ref_frames"] = self._num_ref_frames
        return results


def multiview_loader(step: Mapping[str, Any]) -> Any:
    """Images and cameras by name under ``images``."""
    return _MultiViewLoader(step)
