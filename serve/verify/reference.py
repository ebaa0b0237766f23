"""Reference model of a comparison: native mmdet / mmdet3d inference without `serve.runtime`.

mmdet's and mmdet3d's own functions (`serve.verify.upstream`) build the model from config and checkpoint, read the file
and run the network; the result is only rewritten to the dictionary that a server returns. `filter_by_score` applies
the threshold.

Frames are given as paths, because mmdet3d 1.4.0 cannot take arrays in memory (its ``inference_detector`` passes a
wrapped point cloud to a pipeline step that expects an array, and modifies the model's config).
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.compare.labels import encode_labels, encode_segments
from serve.errors import (
    ArchiveError,
    CheckpointError,
    InferenceFailed,
    ServeError,
    SetupError,
    UndecodableFrame,
)
from serve.protocol.frames import Limits, Modality
from serve.protocol.points import PointLayout, decode_points, sniff
from serve.protocol.sweeps import SweepSpec, is_sweep_part, nearest, parse_sweeps
from serve.settings.environment import variable_set
from serve.verify import upstream

if TYPE_CHECKING:
    from serve.convert.checkpoint import Checkpoint

__all__ = ["FRAME_SUFFIXES", "ReferenceModel", "choose_device", "filter_by_score", "load_reference"]

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
        modality: kind of frame, one of `serve.protocol.frames.MODALITIES`.
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


def load_reference(
    config: str | Path,
    checkpoint: str | Path,
    device: str | None = None,
    *,
    classes: Sequence[str] = (),
    allow_partial: bool = False,
    trust_checkpoint: bool = False,
) -> ReferenceModel:
    """Build a model with mmdet's / mmdet3d's own functions.

    Config and class names are read as a conversion reads them (`serve.convert`): old configs, class names by option.

    Args:
        config: path of a config file, or a name in the model zoo (pre-1.0 names too).
        checkpoint: path of a checkpoint. Read with ``weights_only=True`` and an allow-list of types.
        device: ``cpu`` or ``cuda:N``; if None, ``cuda:0`` if available, as in TorchServe.
        classes: class names by label, in place of those of checkpoint and config.
        allow_partial: continue when weights are missing or unexpected; missing ones are those of a conversion.
        trust_checkpoint: unpickle any type in the checkpoint.

    Raises:
        ModelLookupError: no such config.
        CheckpointError: the checkpoint is missing, rejected, or does not fit the config.
        SetupError: the model cannot be built, or is of an unsupported kind.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"checkpoint {checkpoint} does not exist; check the path")
    device = choose_device(device)

    import torch

    import serve.ops

    serve.ops.install()
    from serve.runtime.model import is_segmentor
    from serve.runtime.pipeline import box_type_of, frame_spec

    with _suppress_warnings():
        from mmengine.config import Config

        from serve.convert.blame import blaming
        from serve.convert.checkpoint import load_checkpoint
        from serve.convert.classes import check_against_head, find_class_names
        from serve.convert.config import read_config, reduce_config
        from serve.runtime.object_paths import resolve_objects
        from serve.storage import backends  # noqa: F401  (registers s3:// and packed files with mmengine)

        path = _resolve_path(config)
        whole = read_config(path)
        reduced = reduce_config(whole, path)
        scope = reduced.package
        # The data set without wrappers and test-time augmentation, which upstream's functions do not take.
        parsed = Config(
            {
                **whole.full,
                "default_scope": scope,
                "model": resolve_objects(whole.full["model"]),
                "backend_args": None,  # given to every step that has none (serve.storage.config_backend)
                "test_dataloader": _reading_locally(resolve_objects(reduced.config["test_dataloader"])),
            }
        )
    read = load_checkpoint(Path(checkpoint), trust=trust_checkpoint)
    with blaming(f"config {path}"):
        named = find_class_names(reduced.config, read.classes or (), classes)
        check_against_head(named, reduced.config["model"])
    output = io.StringIO()
    with (
        _suppress_warnings(),
        contextlib.redirect_stdout(output),
        _readable_checkpoint(trust=trust_checkpoint),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)  # of weights that the checkpoint lacks, as in a conversion
        try:
            module = upstream.build(parsed, Path(checkpoint), device)
        except Exception as error:
            kind = CheckpointError if "load" in str(error).lower() else SetupError
            raise kind(f"{scope} cannot build {path} with {checkpoint}: {error}") from error
    fits = "do not match exactly" not in output.getvalue()
    notes = (*reduced.notes, *_adapt_weights(module, read, fits=fits, allow_partial=allow_partial))
    notes = (*notes, *upstream.patch(module))
    module.dataset_meta = {**(getattr(module, "dataset_meta", None) or {}), "classes": named.names}
    try:
        with blaming(f"config {path}"):
            spec = frame_spec(reduced.config)
    except ArchiveError as error:
        raise SetupError(f"{path} cannot be compared: {error}") from None
    flat = scope == "mmdet" or spec.modality == "image" or is_segmentor(module)
    return ReferenceModel(
        modality=spec.modality,
        classes=named.names,
        box_type_3d=None if flat else box_type_of(reduced.config),
        load_dim=spec.load_dim if spec.has_points else None,
        module=module,
        notes=notes,
        parts=spec.parts,
        layout=spec.layout if spec.has_points else None,
        sweeps=spec.sweeps,
    )


def _reading_locally(loader: dict[str, Any]) -> dict[str, Any]:
    """Drop the storage that training read from: the frames of a comparison are files of this machine."""
    dataset = loader["dataset"]
    pipeline = [
        {name: value for name, value in step.items() if name not in ("backend_args", "file_client_args")}
        for step in dataset["pipeline"]
    ]
    # mmdet3d creates the data set for its colours, without reading the annotations that a converted config lacks.
    missing = {"data_root": ""} if "ann_files" in dataset else {"data_root": "", "ann_file": ""}
    return {**loader, "dataset": {**missing, **dataset, "pipeline": pipeline}}


def _resolve_path(config: str | Path) -> Path:
    """Path of a config file, or of the zoo's config of that name."""
    if Path(config).is_file():
        return Path(config)
    from serve import zoo

    return zoo.resolve(config).config_path


def _adapt_weights(module: Any, read: Checkpoint, *, fits: bool, allow_partial: bool) -> tuple[str, ...]:
    """Adapt old kernel layouts and box frames, which mmengine's loader cannot; returns remarks on the changes.

    Without such changes the weights stay as mmengine loaded them, so that the reference is independent of
    `serve.convert`.
    """
    from serve.convert.legacy_weights import adapt_and_load

    loaded = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    report = adapt_and_load(module, read, allow_partial=True)
    if not report.ok and not allow_partial:
        raise CheckpointError(
            f"the checkpoint does not fit the config (--allow-partial compares what fits): "
            f"{' '.join(report.summary(5).split())}"
        )
    notes = report.notes[len(read.notes) :]
    if fits and not notes:
        for name, tensor in module.state_dict().items():  # load_state_dict could rename keys
            tensor.copy_(loaded[name])
    return notes


def choose_device(device: str | None) -> str:
    """Check the name of a device; None stands for ``cuda:0`` if there is one, or else the CPU.

    Raises:
        SetupError: no such device.
    """
    import torch

    if device is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise SetupError(f"{device!r} is not a device; use cpu or cuda:N") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise SetupError(f"device {device} does not exist on this machine; use cpu")
    return device


@contextlib.contextmanager
def _readable_checkpoint(*, trust: bool) -> Iterator[None]:
    """Let mmengine's own loader read OpenMMLab checkpoints with ``weights_only=True``, or any with `trust`."""
    from serve.convert.safe_globals import safe_globals_for_openmmlab

    if not trust:
        with safe_globals_for_openmmlab():
            yield
        return
    with variable_set("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"):  # torch reads it at every call
        yield


@contextlib.contextmanager
def _suppress_warnings() -> Iterator[None]:
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
        with _suppress_warnings(), DefaultScope.overwrite_default_scope(scope), fixed_seed(device), stays:
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
