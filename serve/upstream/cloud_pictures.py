"""Pictures of point clouds for ``test --show-dir`` without open3d: from above, with the detections.

mmdet3d draws clouds in a window of open3d, which needs a display and has no wheels for all systems. Images that belong
to a cloud are still drawn by mmdet3d itself.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import cv2

__all__ = ["draw_clouds_from_above"]

_OF_CLOUDS = ("lidar_det", "multi-modality_det", "lidar_seg")
_SIZE = (1200, 900)


def draw_clouds_from_above(module: ModuleType) -> None:
    """Replace drawings of clouds in ``mmdet3d.visualization.local_visualizer``, unless open3d is installed."""
    if module.__dict__["o3d"] is not None:
        return
    visualizer = module.__dict__["Det3DLocalVisualizer"]
    drawn_by_upstream = visualizer.add_datasample

    def add_datasample(
        self: Any, name: str, data_input: Any, data_sample: Any = None, **options: Any
    ) -> None:
        """Draw a frame into the files that the hook names."""
        task, path = options.get("vis_task"), options.pop("o3d_save_path", None)
        if task not in _OF_CLOUDS or options.get("show"):
            drawn_by_upstream(self, name, data_input, data_sample, o3d_save_path=path, **options)
            return
        if path is not None and path == options.get("out_file"):  # KITTI's image has the name of its cloud
            path = str(Path(path).with_stem(f"{Path(path).stem}_cloud"))
        if path is not None:
            _write(self, data_input["points"], data_sample, options.get("pred_score_thr", 0.3), Path(path))
        if task == "multi-modality_det" and options.get("out_file") is not None:
            of_image = {**options, "vis_task": "mono_det"}
            drawn_by_upstream(self, name, {"img": data_input["img"]}, data_sample, **of_image)

    visualizer.add_datasample = add_datasample


def _write(visualizer: Any, points: Any, sample: Any, score_thr: float, path: Path) -> None:
    from serve.runtime.predictions import postprocess
    from serve.visualize.birds_eye import draw_birds_eye_view
    from serve.visualize.overlays import draw_point_labels

    classes = list(visualizer.dataset_meta.get("classes") or ())
    model = {"name": path.stem, "version": ""}
    if "pred_pts_seg" in sample:
        picture = draw_point_labels(
            points, postprocess(sample, classes, None, model), size=_SIZE, title=path.stem
        )
    else:
        kind = type(sample.pred_instances_3d.bboxes_3d).__name__.removesuffix("Instance3DBoxes")
        answer = postprocess(sample, classes, kind, model)
        picture = draw_birds_eye_view(points, answer, size=_SIZE, title=path.stem, score_thr=score_thr)
    cv2.imwrite(str(path), picture)
