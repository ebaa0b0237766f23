"""Loaders of test pipelines that read frames from memory instead of files.

`LOADERS` converts a configured step of upstream's to a transform with the same results; `derived_loader` does so for a
user's class that derives from one, and keeps what the class adds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import ArchiveError

__all__ = ["LOADERS", "derived_loader"]

_FILE_ARGUMENTS = ("type", "backend_args", "file_client_args")
Step = Mapping[str, Any]


def _arguments(step: Step) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key not in _FILE_ARGUMENTS}


@cache
def _points_from_frame() -> type:
    from mmdet3d.datasets.transforms import LoadPointsFromFile

    class LoadPointsFromFrame(LoadPointsFromFile):  # type: ignore[misc]
        def _load_points(self, frame: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            self.has_read = True
            # The pipeline may modify its points in place; the frame belongs to the caller.
            return _in_memory(frame).copy()

    return LoadPointsFromFrame


@cache
def _sweeps_from_frame() -> type:
    from mmdet3d.datasets.transforms import LoadPointsFromMultiSweeps

    class LoadSweepsFromFrame(LoadPointsFromMultiSweeps):  # type: ignore[misc]
        def transform(self, results: dict[str, Any]) -> dict[str, Any]:
            self.has_read = True
            if not results.get("sweeps_accumulated"):
                loaded: dict[str, Any] = super().transform(results)
                return loaded
            results["points"] = results["points"][:, self.use_dim]
            return results

        def _load_points(self, frame: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            return _in_memory(frame)

    return LoadSweepsFromFrame


@cache
def _image_from_frame() -> type:
    from mmcv.transforms import LoadImageFromFile

    class LoadImageFromFrame(LoadImageFromFile):  # type: ignore[misc]
        def transform(self, results: dict[str, Any]) -> dict[str, Any]:
            self.has_read = True
            return _set_image(results, self.to_float32)

    return LoadImageFromFrame


@cache
def _mono_image_from_frame() -> type:
    from mmdet3d.datasets.transforms import LoadImageFromFileMono3D

    class LoadMonoImageFromFrame(LoadImageFromFileMono3D):  # type: ignore[misc]
        def transform(self, results: dict[str, Any]) -> dict[str, Any]:
            self.has_read = True
            results["cam2img"] = results["cam2img"].tolist()
            return _set_image(results, self.to_float32)

    return LoadMonoImageFromFrame


@cache
def _views_from_frame() -> type:
    from mmdet3d.datasets.transforms import LoadMultiViewImageFromFiles

    class LoadViewsFromFrame(LoadMultiViewImageFromFiles):  # type: ignore[misc]
        def transform(self, results: dict[str, Any]) -> dict[str, Any]:
            self.has_read = True
            results = _set_views(results, to_float32=self.to_float32)
            if self.set_default_scale:
                results["scale_factor"] = 1.0
            results["num_views"] = self.num_views
            results["num_ref_frames"] = self.num_ref_frames
            return results

    return LoadViewsFromFrame


def _in_memory(frame: Any) -> npt.NDArray[np.float32]:
    if not isinstance(frame, np.ndarray):
        raise ArchiveError(
            f"the loading step names a file of its own, {str(frame)[:80]}; a server has frames in memory"
        )
    return frame


def _set_image(results: dict[str, Any], to_float32: bool) -> dict[str, Any]:
    """Set the pipeline's keys of a decoded image as mmdet's `LoadImageFromNDArray` does."""
    image = results["img"].astype(np.float32) if to_float32 else results["img"]
    results.update(img_path=None, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
    return results


def _set_views(results: dict[str, Any], *, to_float32: bool) -> dict[str, Any]:
    """Set images, cameras and their common size, zero-padded at the right and bottom like upstream's."""
    cameras = list(results["images"].values())
    images = [camera.pop("img") for camera in cameras]
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    padded = []
    for image in images:
        canvas = np.zeros((height, width, *image.shape[2:]), np.float32 if to_float32 else image.dtype)
        canvas[: image.shape[0], : image.shape[1]] = image
        padded.append(canvas)
    for name in ("cam2img", "lidar2cam"):
        results[name] = [camera[name] for camera in cameras]
    results["ori_cam2img"] = [camera["cam2img"].copy() for camera in cameras]
    results["img"] = padded
    results["filename"] = [None] * len(padded)
    for name in ("img_shape", "ori_shape", "pad_shape"):
        results[name] = (height, width)
    channels = images[0].shape[2] if images[0].ndim == 3 else 1
    results["img_norm_cfg"] = {
        "mean": np.zeros(channels, dtype=np.float32),
        "std": np.ones(channels, dtype=np.float32),
        "to_rgb": False,
    }
    return results


_FROM_FRAME: Mapping[str, Callable[[], type]] = {
    "LoadPointsFromFile": _points_from_frame,
    "LoadPointsFromMultiSweeps": _sweeps_from_frame,
    "LoadImageFromFile": _image_from_frame,
    "LoadImageFromFileMono3D": _mono_image_from_frame,
    "LoadMultiViewImageFromFiles": _views_from_frame,
}


def _loader(kind: str) -> Callable[[Step], Any]:
    return lambda step: _FROM_FRAME[kind]()(**_arguments(step))


#: Name of upstream's loading step → function that makes its counterpart for frames in memory.
LOADERS: Mapping[str, Callable[[Step], Any]] = {kind: _loader(kind) for kind in _FROM_FRAME}


def derived_loader(step: Step, derived: type, kind: str) -> Any:
    """Create a user's loading step that takes its frame from memory.

    A class is made whose method resolution order is the user's class, then the counterpart of `kind`, then `kind`:
    what the user's class does around ``super()`` stays, and what upstream's would read comes from the frame.

    Args:
        step: the configured step.
        derived: the user's class.
        kind: name of upstream's loading step that it derives from.

    Returns:
        A transform; it raises `ArchiveError` if the user's class reads its file without upstream's.
    """
    name = f"{derived.__module__}.{derived.__qualname__}"

    class FromFrame(derived, _FROM_FRAME[kind]()):  # type: ignore[misc]
        def __call__(self, results: dict[str, Any]) -> Any:
            self.has_read = False
            failure: Exception | None = None
            loaded: Any = None
            try:
                loaded = super().__call__(results)
            except ArchiveError:
                raise
            except Exception as error:
                failure = error
            if not self.has_read:
                raise ArchiveError(
                    f"the loading step {name} reads its file without {kind}, and a server has frames in memory; let it "
                    "call super() and change what that returns"
                ) from failure
            if failure is not None:
                raise failure
            return loaded

    return FromFrame(**{key: copy.deepcopy(value) for key, value in step.items() if key != "type"})
