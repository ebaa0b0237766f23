"""Loaders of test pipelines that read frames from memory instead of files.

Each function converts a configured loading step to a transform with the same results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["image_loader", "mono_loader", "multiview_loader", "point_loader", "sweep_loader"]


def point_loader(step: Mapping[str, Any]) -> Any:
    """Create mmdet3d's own point loader without the file read; it handles use_dim, shift_height and the rest."""
    from mmdet3d.datasets.transforms import LoadPointsFromFile

    class LoadPointsFromFrame(LoadPointsFromFile):  # type: ignore[misc]
        def _load_points(self, frame: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            # The pipeline may modify its points in place; the frame belongs to the caller.
            return frame.copy()

    arguments = {
        key: value for key, value in step.items() if key not in ("type", "backend_args", "file_client_args")
    }
    return LoadPointsFromFrame(**arguments)


def sweep_loader(step: Mapping[str, Any]) -> Any:
    """Create mmdet3d's own loader of sweeps without the file reads; a cloud of several sweeps passes through it."""
    from mmdet3d.datasets.transforms import LoadPointsFromMultiSweeps

    class LoadSweepsFromFrame(LoadPointsFromMultiSweeps):  # type: ignore[misc]
        def transform(self, results: dict[str, Any]) -> dict[str, Any]:
            if not results.get("sweeps_accumulated"):
                loaded: dict[str, Any] = super().transform(results)
                return loaded
            results["points"] = results["points"][:, self.use_dim]
            return results

        def _load_points(self, frame: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            return frame

    arguments = {
        key: value for key, value in step.items() if key not in ("type", "backend_args", "file_client_args")
    }
    return LoadSweepsFromFrame(**arguments)


def image_loader(step: Mapping[str, Any]) -> Any:
    """Create mmdet's loader of arrays."""
    from mmdet.datasets.transforms import LoadImageFromNDArray

    return LoadImageFromNDArray(to_float32=bool(step.get("to_float32", False)))


class _MonoLoader:
    """Loader of an image and its camera, as nested lists like `mmdet3d.datasets.LoadImageFromFileMono3D`."""

    def __init__(self, load: Any) -> None:
        self._load = load

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load the image and convert the camera matrix to lists."""
        results["cam2img"] = results["cam2img"].tolist()
        loaded: dict[str, Any] = self._load(results)
        return loaded


def mono_loader(step: Mapping[str, Any]) -> Any:
    """Create a loader of an image with ``cam2img``."""
    return _MonoLoader(image_loader(step))


class _MultiViewLoader:
    """Loader of images of several cameras, zero-padded to one size at the right and bottom like upstream's."""

    def __init__(self, step: Mapping[str, Any]) -> None:
        self._to_float32 = bool(step.get("to_float32", False))
        self._scaled = bool(step.get("set_default_scale", True))
        self._num_views = int(step.get("num_views", 5))
        self._num_ref_frames = int(step.get("num_ref_frames", -1))

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Set images, cameras and their common size under the pipeline's keys."""
        cameras = list(results["images"].values())
        height, width = (max(camera["img"].shape[axis] for camera in cameras) for axis in (0, 1))
        padded = []
        for camera in cameras:
            canvas = np.zeros((height, width, 3), dtype=np.float32 if self._to_float32 else np.uint8)
            image = camera.pop("img")
            canvas[: image.shape[0], : image.shape[1]] = image
            padded.append(canvas)
        for name in ("cam2img", "lidar2cam"):
            results[name] = [camera[name] for camera in cameras]
        results["ori_cam2img"] = [camera["cam2img"].copy() for camera in cameras]
        results["img"] = padded
        results["filename"] = [None] * len(padded)
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
    """Create a loader of images and cameras by name under ``images``."""
    return _MultiViewLoader(step)
