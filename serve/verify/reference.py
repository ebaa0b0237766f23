"""Reference model of a comparison: native mmdet / mmdet3d inference without `serve.runtime`.

mmdet's and mmdet3d's own functions (`serve.verify.upstream`) build the model (`serve.verify.reference_loading`), read
the file and run the network; the result is only rewritten to the dictionary that a server returns. `filter_by_score`
applies the threshold.

Frames are given as paths, because mmdet3d 1.4.0 cannot take arrays in memory (its ``inference_detector`` passes a
wrapped point cloud to a pipeline step that expects an array, and modifies the model's config).
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve.compare.labels import encode_labels, encode_segments
from serve.errors import InferenceFailed, ServeError, UndecodableFrame
from serve.protocol.frame_spec import Modality
from serve.protocol.point_columns import PointLayout
from serve.protocol.point_signatures import sniff
from serve.protocol.points import decode_points
from serve.protocol.sweeps import SweepSpec, is_sweep_part, nearest, parse_sweeps
from serve.settings import Limits
from serve.verify import upstream

__all__ = ["FRAME_SUFFIXES", "ReferenceModel", "filter_by_score", "suppress_warnings"]

#: File name suffixes of each part of a frame.
FRAME_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "points": (".bin", ".npy", ".npz", ".pcd", ".ply", ".las", ".laz"),
    "image": (
        ".jpg",
        ".jpeg",
        ".png",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".jp2",
        ".gif",
        ".avif",
        ".ppm",
        ".pgm",
    ),
    "calibration": (".json",),
    "sweeps": (".json",),
}
_NO_POINTS = "{} holds no points; mmdet3d cannot run on an empty point cloud, so there is nothing to compare"
_BOX_TYPES = {
    "LiDARInstance3DBoxes": "LiDAR",
    "CameraInstance3DBoxes": "Camera",
    "DepthInstance3DBoxes": "Depth",
}


@dataclass(frozen=True)
class ReferenceModel:
    """A model built by mmdet / mmdet3d.

    Attributes:
        modality: kind of frame, one of `serve.protocol.frame_spec.MODALITIES`.
        classes: class names, by label.
        box_type_3d: ``LiDAR``, ``Camera`` or ``Depth``; None for 2D boxes and for labels.
        load_dim: floats per point in a ``.bin`` file; None without a point cloud.
        module: the ``torch.nn.Module``.
        notes: remarks on changes to weights or network, without which upstream cannot run them.
        parts: names of the parts of a frame.
        layout: columns of its points; None without a point cloud.
        sweeps: sweeps that the model takes besides; None if it takes one cloud.
    """

    modality: Modality
    classes: tuple[str, ...]
    box_type_3d: str | None
    load_dim: int | None
    module: Any = field(repr=False)
    notes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("points",)
    layout: PointLayout | None = None
    sweeps: SweepSpec | None = None

    def detect(self, frame: str | Path | Mapping[str, str | Path], variant: int = 0) -> dict[str, Any]:
        """Run one frame; returns all predictions of the network, without a threshold.

        Args:
            frame: the file of a frame of one part, or the files by part. Point clouds are a ``.bin`` of float32 rows
                of ``load_dim`` or a file of any format that a server reads, images encoded, calibrations JSON.
                Of several sweeps ``points``, ``sweep.0``, … and ``sweeps`` (`serve.protocol.sweeps`).
            variant: 0 for the model; another number for one of its variants, whose weights are changed by as little
                as rounding changes what they compute (`serve.compare.ties.confirm_ties`).

        Returns:
            3D: ``bboxes_3d`` (N, 7 or 9) in metres, metres, radians in the frame of ``box_type_3d``, origin
            as in mmdet3d (bottom centre), ``scores_3d``, ``labels_3d``, ``box_type_3d``, ``names``.
            2D: ``bboxes`` (N, 4) in pixels of the original image, ``scores``, ``labels``, ``names``, and
            ``masks`` as COCO RLE if the model predicts them. Labels: ``pts_semantic_mask``, or ``panoptic_seg``
            and ``segments_info``, encoded as in a response. Lists of Python numbers throughout.

        Raises:
            UndecodableFrame: a file is missing, or not a part of a frame of this model.
            InferenceFailed: the network raised an error.
        """
        from serve.runtime.rounding import changed_weights

        files = self._check_files(frame)
        with changed_weights(self.module, variant):
            return self._detect_in_files(files)

    def _detect_in_files(self, files: dict[str, Path]) -> dict[str, Any]:
        if self.modality == "image":
            return self._detect_in_image(files["image"])
        if "sweeps" in files:
            return self._detect_in_sweeps(files)
        if self.modality not in ("lidar", "depth"):
            with contextlib.ExitStack() as stack:
                if "points" in files:
                    files["points"] = stack.enter_context(_as_bin(files["points"], self.layout))
                stack.enter_context(_map_errors("mmdet3d", files[self.parts[0]], self.module))
                return self._read(upstream.detect_with_calibration(self.module, files, self.parts))
        with _as_bin(files["points"], self.layout) as cloud:
            if self.box_type_3d is None:
                with _map_errors("mmdet3d", cloud, self.module):
                    return self._read(upstream.segment_points(self.module, cloud))
            if self._has_no_points_in_range(cloud):
                return self._add_names(
                    {"bboxes_3d": [], "scores_3d": [], "labels_3d": [], "box_type_3d": self.box_type_3d}
                )
            with _map_errors("mmdet3d", cloud, self.module):
                return self._read(upstream.detect_in_points(self.module, cloud))

    def _detect_in_sweeps(self, files: Mapping[str, Path]) -> dict[str, Any]:
        """Run mmdet3d's own pipeline on a key frame and its sweeps, as on the entries of a data set's infos."""
        assert self.sweeps is not None
        poses = parse_sweeps(files["sweeps"].read_bytes())
        if clouds := {name for name in files if name.startswith("sweep.")} ^ {
            f"sweep.{k}" for k in range(len(poses))
        }:
            raise UndecodableFrame(
                f"{files['sweeps']} describes {len(poses)} sweeps; {min(clouds)} is there or in it only"
            )
        with contextlib.ExitStack() as stack:
            key = stack.enter_context(_as_bin(files["points"], self.layout))
            sweeps = [
                (
                    stack.enter_context(_as_bin(files[f"sweep.{k}"], self.sweeps.layout)),
                    poses[k].time_lag_s,
                    poses[k].lidar2sensor,
                )
                # Upstream draws at random among more than it takes, unless the step says test_mode.
                for k in nearest(poses, self.sweeps.number)
            ]
            stack.enter_context(_map_errors("mmdet3d", key, self.module))
            return self._read(
                upstream.detect_in_sweeps(self.module, key, sweeps, self.box_type_3d or "LiDAR")
            )

    def _check_files(self, frame: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
        if not isinstance(frame, Mapping):
            frame = {self.parts[0]: frame}
        own = {name for name in frame if self.sweeps is not None and is_sweep_part(name)}
        if set(frame) - own != set(self.parts) or (own and "sweeps" not in own):
            raise UndecodableFrame(
                f"a frame of this model has the parts {', '.join(self.parts)}, not {', '.join(frame)}"
            )
        files = {name: Path(path) for name, path in frame.items()}
        for name, path in files.items():
            if not path.is_file():
                raise UndecodableFrame(f"file {path} does not exist")
            known = FRAME_SUFFIXES["points" if name.startswith("sweep.") else name.partition(".")[0]]
            if path.suffix.lower() not in known:
                raise UndecodableFrame(
                    f"{path.name} is not a frame for a {self.modality} model, which reads {', '.join(known)}"
                )
        return files

    def _read(self, sample: Any) -> dict[str, Any]:
        """Convert a data sample of mmdet3d to a dictionary of predictions."""
        if "pred_pts_seg" in sample:
            labels = sample.pred_pts_seg.pts_semantic_mask.detach().cpu().numpy()
            return {"pts_semantic_mask": encode_labels(labels)}
        found = sample.pred_instances_3d
        return self._add_names(
            {
                "bboxes_3d": found.bboxes_3d.tensor.detach().float().cpu().tolist(),
                "scores_3d": found.scores_3d.detach().float().cpu().tolist(),
                "labels_3d": found.labels_3d.detach().cpu().tolist(),
                "box_type_3d": _BOX_TYPES.get(type(found.bboxes_3d).__name__, type(found.bboxes_3d).__name__),
            }
        )

    def _has_no_points_in_range(self, path: Path) -> bool:
        """Whether no point is in the model's range, for which mmdet3d 1.4 raises IndexError."""
        layer = getattr(getattr(self.module, "data_preprocessor", None), "voxel_layer", None)
        bounds = getattr(layer, "point_cloud_range", None)
        if bounds is None or len(bounds) != 6:
            return False
        points = np.fromfile(path, dtype="<f4").reshape(-1, self.load_dim or 4)[:, :3]
        low, high = np.asarray(bounds, dtype=np.float32).reshape(2, 3)
        return not bool(((points >= low) & (points < high)).all(axis=1).any())

    def _detect_in_image(self, path: Path) -> dict[str, Any]:
        import cv2

        if cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is None:
            raise UndecodableFrame(f"{path} is not a readable image")
        scope = str(self.module.cfg.get("default_scope") or "mmdet")
        with _map_errors(scope, path, self.module):
            sample = upstream.detect_in_image(self.module, path)
        if "pred_panoptic_seg" in sample:
            segments = np.asarray(sample.pred_panoptic_seg.sem_seg)
            return encode_segments(segments.reshape(segments.shape[-2:]), self.classes)
        found = sample.pred_instances
        answer = {
            "bboxes": getattr(found.bboxes, "tensor", found.bboxes).detach().float().cpu().tolist(),
            "scores": found.scores.detach().float().cpu().tolist(),
            "labels": found.labels.detach().long().cpu().tolist(),
        }
        if "masks" in found:
            answer["masks"] = _as_rle(found.masks.detach().cpu().numpy())
        return self._add_names(answer)

    def _add_names(self, answer: dict[str, Any]) -> dict[str, Any]:
        labels = answer.get("labels_3d", answer.get("labels"))
        known = range(len(self.classes))
        answer["names"] = [self.classes[label] if label in known else str(label) for label in labels or ()]
        return answer


def filter_by_score(detections: Mapping[str, Any], score_thr: float) -> dict[str, Any]:
    """Keep the detections with a score of at least ``score_thr``, in order; other entries stay unchanged."""
    scores = detections.get("scores_3d", detections.get("scores"))
    if scores is None:
        return dict(detections)
    keep = [k for k, score in enumerate(scores) if score >= score_thr]
    per_detection = {"bboxes_3d", "scores_3d", "labels_3d", "bboxes", "scores", "labels", "names", "masks"}
    return {
        key: [value[k] for k in keep] if key in per_detection else value for key, value in detections.items()
    }


@contextlib.contextmanager
def suppress_warnings() -> Iterator[None]:
    """Drop the frameworks' warnings, which concern their internals.

    They are recorded and dropped, because mmdet turns an ``ignore`` filter into ``once`` while building a detector.
    """
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _map_errors(scope: str, path: Path, module: Any) -> Iterator[None]:
    """Run upstream's code with registry scope `scope` and the runtime's random seed; map its errors.

    The seed is `serve.runtime.random_state`'s: models that sample points would otherwise differ from run to run. On
    a CPU, ``Tensor.cuda()`` does nothing: mmdet3d 1.4.0 calls it before MinkUNet on any device.
    """
    from mmengine.registry import DefaultScope

    from serve.runtime.random_state import fixed_seed

    device = next(module.parameters()).device
    stays = _no_cuda() if device.type == "cpu" else contextlib.nullcontext()
    try:
        with suppress_warnings(), DefaultScope.overwrite_default_scope(scope), fixed_seed(device), stays:
            yield
    except Exception as error:
        raise InferenceFailed(f"native inference on {path.name} failed: {error}") from error


@contextlib.contextmanager
def _no_cuda() -> Iterator[None]:
    import torch

    method = torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = method  # type: ignore[method-assign]


@contextlib.contextmanager
def _as_bin(path: Path, layout: PointLayout | None) -> Iterator[Path]:
    """Yield the path of the point cloud as ``.bin``, the only format that mmdet3d reads."""
    layout = layout or PointLayout.default(4, is_depth=False)
    load_dim = len(layout.columns)
    body = path.read_bytes()
    if path.suffix.lower() == ".bin" and sniff(body) is None:
        if len(body) % (4 * load_dim):
            raise UndecodableFrame(
                f"{path} holds {len(body)} bytes, not a multiple of {4 * load_dim} (points of {load_dim} float32)"
            )
        if not body:
            raise UndecodableFrame(_NO_POINTS.format(path))
        yield path
        return
    try:
        cloud = decode_points(body, layout, Limits())
    except ServeError as error:
        raise UndecodableFrame(f"{path}: {error}") from error
    if not len(cloud):
        raise UndecodableFrame(_NO_POINTS.format(path))
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-") as folder:
        copy = Path(folder, path.stem + ".bin")
        np.ascontiguousarray(cloud, np.float32).tofile(copy)
        yield copy


def _as_rle(masks: Any) -> list[dict[str, Any]]:
    """(N, H, W) bool → COCO RLE with ``counts`` as text."""
    from pycocotools import mask as coco

    encoded = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    return [{"size": [int(n) for n in one["size"]], "counts": one["counts"].decode()} for one in encoded]
