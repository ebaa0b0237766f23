"""Frames to network inputs: the config's own test pipeline, fed from memory and built once.

Upstream builds the pipeline anew for every call and changes the model's config on the way
(mmdet3d `apis/inference.py`); here the loader at its head is replaced by one that takes the decoded
frame, and everything after it stays as configured. Knows nothing about networks or answers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import ArchiveError
from serve.runtime.model import quiet_upstream, scope_of
from serve.wire import COLOR_TYPES, FrameSpec

__all__ = ["SampleBuilder", "frame_spec", "pipeline_of"]

POINT_LOADERS = {"LoadPointsFromFile", "mmdet3d.LoadPointsFromFile"}
IMAGE_LOADERS = {"LoadImageFromFile", "mmdet.LoadImageFromFile", "mmcv.LoadImageFromFile"}


def pipeline_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The test pipeline of a config, through any data set wrappers.

    Raises:
        ArchiveError: the config has none.
    """
    dataset = (config.get("test_dataloader") or {}).get("dataset")
    while isinstance(dataset, Mapping) and "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    pipeline = dataset.get("pipeline") if isinstance(dataset, Mapping) else None
    if not pipeline:
        raise ArchiveError(
            "the config has no test_dataloader.dataset.pipeline: nothing says how a frame is prepared"
        )
    return [dict(step) for step in pipeline]


def frame_spec(config: Mapping[str, Any]) -> FrameSpec:
    """What frames the config's pipeline takes.

    Raises:
        ArchiveError: it starts with a loader we do not serve.
    """
    first = pipeline_of(config)[0]
    if first["type"] in POINT_LOADERS:
        return FrameSpec("lidar", load_dim=int(first.get("load_dim", 6)))
    if first["type"] in IMAGE_LOADERS:
        color_type = str(first.get("color_type", "color"))
        if color_type not in COLOR_TYPES or first.get("imdecode_backend") not in (None, "cv2"):
            raise ArchiveError(
                f"image loader {first} is not supported: color_type must be one of {sorted(COLOR_TYPES)}"
            )
        return FrameSpec("image", color_type=color_type)
    raise ArchiveError(
        f"the test pipeline starts with {first['type']}; served are models that start with LoadPointsFromFile or "
        "LoadImageFromFile"
    )


class SampleBuilder:
    """Turns one frame into what ``model.test_step`` takes; built once per model, not safe for threads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the pipeline of a resolved `config`."""
        self.spec = frame_spec(config)
        pipeline = copy.deepcopy(pipeline_of(config))
        with quiet_upstream():
            from mmengine.dataset import Compose
            from mmengine.registry import DefaultScope

            with DefaultScope.overwrite_default_scope(scope_of(config)):
                if self.spec.modality == "lidar":
                    self._constants = _lidar_constants(config)
                    loader: Any = _point_loader(pipeline[0])
                else:
                    self._constants = {"img_id": 0}
                    loader = _image_loader(pipeline[0])
                # Annotation loaders find nothing to load when serving.
                rest = [
                    step
                    for step in pipeline[1:]
                    if not step["type"].split(".")[-1].startswith("LoadAnnotations")
                ]
                self._compose = Compose([loader, *rest])

    def build(self, data: npt.NDArray[Any]) -> dict[str, Any]:
        """Run the pipeline on one frame, (N, load_dim) float32 or (H, W, 3) uint8 BGR."""
        inputs: dict[str, Any] = {key: copy.copy(value) for key, value in self._constants.items()}
        if self.spec.modality == "lidar":
            inputs["lidar_points"] = {"lidar_path": data}
        else:
            inputs["img"] = data
        sample: dict[str, Any] = self._compose(inputs)
        return sample


def _lidar_constants(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `mmdet3d.apis.inference_detector` puts beside the points."""
    from mmdet3d.structures import get_box_type

    dataset = config["test_dataloader"]["dataset"]
    box_type_3d, box_mode_3d = get_box_type(dataset.get("box_type_3d", "LiDAR"))
    return {
        "timestamp": 1,
        "axis_align_matrix": np.eye(4),
        "box_type_3d": box_type_3d,
        "box_mode_3d": box_mode_3d,
    }


def _point_loader(step: Mapping[str, Any]) -> Any:
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


def _image_loader(step: Mapping[str, Any]) -> Any:
    from mmdet.datasets.transforms import LoadImageFromNDArray

    return LoadImageFromNDArray(to_float32=bool(step.get("to_float32", False)))
