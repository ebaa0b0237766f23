"""Input pipeline: the config's own test pipeline, built once and fed from memory.

Upstream rebuilds the pipeline for every call and modifies the model's config (mmdet3d `apis/inference.py`). Here its
loaders are replaced by ones that take the decoded frame; everything after them is as configured.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import ArchiveError
from serve.protocol.frame_spec import FrameSpec, Modality
from serve.protocol.frame_warnings import PointExpectations, intensity_scale
from serve.protocol.frames import Frame
from serve.protocol.images import COLOR_TYPES, Decoder
from serve.protocol.sweeps import ACCUMULATED, Sweep, SweepSpec
from serve.runtime.loaders import LOADERS, derived_loader
from serve.runtime.model import scope_of, suppress_warnings
from serve.runtime.object_paths import resolve_objects

__all__ = ["InputPipeline", "box_type_of", "dataset_of", "frame_spec", "pipeline_of"]

# Steps for training and evaluation only, which mmdet3d's own `inference_segmentor` drops too.
ANNOTATION_LOADERS = ("LoadAnnotations", "LoadPanopticAnnotations", "PointSegClassMapping")
# Steps of pipelines that need more than one frame.
NOT_PER_FRAME = {
    "TransformBroadcaster": "it tracks objects through a video",
    "LoadProposals": "it needs the proposals of another model",
    "PackReIDInputs": "it returns a feature vector of an image crop, not detections",
}
# Settings of loading steps that say what a frame is; a user's class may set others than its configured step.
_LOADER_SETTINGS = (
    *("coord_type", "load_dim", "use_dim", "norm_intensity", "sweeps_num", "time_dim", "pad_empty_sweeps"),
    *("color_type", "imdecode_backend", "to_float32", "num_views", "num_ref_frames", "set_default_scale"),
)
_KNOWN = frozenset((*LOADERS, *NOT_PER_FRAME, "Pack3DDetInputs", "PackDetInputs"))
_SAMPLE = Path(__file__).parents[1] / "assets" / "sample.bin"
_SWEEPS = "LoadPointsFromMultiSweeps"
# Word in the type of a data set → its largest intensity.
INTENSITY_MAX = {"kitti": 1.0, "waymo": 1.0, "nuscenes": 255.0, "lyft": 255.0}
BOX_TYPES = {"lidar": "LiDAR", "camera": "Camera", "depth": "Depth"}


def dataset_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Find the test data set of a config inside any wrappers; of several joined ones the first with a pipeline.

    Raises:
        ArchiveError: none of them has a pipeline.
    """
    dataset = _with_pipeline((config.get("test_dataloader") or {}).get("dataset"))
    if dataset is None:
        raise ArchiveError(
            "the config has no test_dataloader.dataset.pipeline: nothing says how a frame is prepared"
        )
    return dataset


def _with_pipeline(dataset: Any) -> dict[str, Any] | None:
    if isinstance(dataset, list | tuple):
        return next((found for one in dataset if (found := _with_pipeline(one)) is not None), None)
    if not isinstance(dataset, dict):
        return None
    if dataset.get("pipeline"):
        return dataset
    inner = [dataset[name] for name in ("dataset", "datasets") if dataset.get(name)]
    return _with_pipeline(inner)


def pipeline_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of the test pipeline of a config; raises like `dataset_of`."""
    return [dict(step) for step in dataset_of(config)["pipeline"]]


def box_type_of(config: Mapping[str, Any]) -> str:
    """Return ``LiDAR``, ``Camera`` or ``Depth`` for any spelling in the config."""
    spelling = str(dataset_of(config).get("box_type_3d", "LiDAR"))
    return BOX_TYPES.get(spelling.lower(), spelling)


def frame_spec(config: Mapping[str, Any]) -> FrameSpec:
    """Derive the frames that the config's pipeline accepts.

    Raises:
        ArchiveError: the pipeline is not supported.
    """
    scope = scope_of(config)
    steps = {_kind(step, scope): _effective(step, scope) for step in reversed(pipeline_of(config))}
    for kind, reason in NOT_PER_FRAME.items():
        if kind in steps:
            raise ArchiveError(f"the model cannot be served frame by frame: {reason}")
    known = [kind for kind in LOADERS if kind in steps and kind != _SWEEPS]
    color_type, decoder = _image_decoding(steps)
    box_type = box_type_of(config)
    match known:
        case ["LoadPointsFromFile"]:
            step = steps["LoadPointsFromFile"]
            depth = str(step.get("coord_type", "LIDAR")).upper() == "DEPTH"
            return FrameSpec(
                "depth" if depth else "lidar",
                load_dim=int(step.get("load_dim", 6)),
                used_columns=_used_columns(steps),
                sweeps=_sweeps(steps),
                expected=_expected_points(config, steps),
            )
        case ["LoadImageFromFile"] if scope_of(config) == "mmdet3d" and "Pack3DDetInputs" in steps:
            matrices = _matrices(config, box_type)
            lifted: Modality = "mono3d" if matrices else "image"
            return FrameSpec(lifted, color_type=color_type, decoder=decoder, calibration=matrices)
        case ["LoadImageFromFile"]:
            return FrameSpec("image", color_type=color_type, decoder=decoder)
        case ["LoadImageFromFileMono3D"]:
            # ImVoxelNet has the loader of monocular detectors, but projects from the LiDAR.
            matrices = tuple(dict.fromkeys(("cam2img", *_matrices(config, box_type))))
            return FrameSpec("mono3d", color_type=color_type, decoder=decoder, calibration=matrices)
        case ["LoadPointsFromFile", "LoadImageFromFile"]:
            return FrameSpec(
                "fusion",
                load_dim=int(steps["LoadPointsFromFile"].get("load_dim", 6)),
                used_columns=_used_columns(steps),
                sweeps=_sweeps(steps),
                expected=_expected_points(config, steps),
                color_type=color_type,
                decoder=decoder,
                calibration=("depth2img",) if box_type == "Depth" else ("lidar2img",),
            )
        case ["LoadMultiViewImageFromFiles"]:
            return FrameSpec(
                "multiview",
                color_type=color_type,
                decoder=decoder,
                cameras=_cameras(config, steps["LoadMultiViewImageFromFiles"]),
                calibration=("cam2img", "lidar2cam"),
            )
    first = str(pipeline_of(config)[0]["type"])
    raise ArchiveError(
        f"unsupported test pipeline: it starts with {first} and loads {', '.join(known) or 'nothing'}; supported "
        f"loaders: {', '.join(LOADERS)}, at most one point cloud with one image"
    )


def _loaded_columns(steps: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the indices of the point columns that the loader takes, in its order."""
    use_dim = steps["LoadPointsFromFile"].get("use_dim", (0, 1, 2))
    return tuple(range(use_dim)) if isinstance(use_dim, int) else tuple(int(k) for k in use_dim)


def _used_columns(steps: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the indices of the point columns that the model reads."""
    sweeps = _sweeps(steps)
    # The time of the sweep replaces the column.
    return tuple(k for k in _loaded_columns(steps) if sweeps is None or k != sweeps.time_column)


def _sweeps(steps: Mapping[str, Mapping[str, Any]]) -> SweepSpec | None:
    """Return the sweeps that the pipeline loads.

    Raises:
        ArchiveError: its key frame has no column for the time.
    """
    step = steps.get(_SWEEPS)
    if step is None:
        return None
    loaded, time_column = _loaded_columns(steps), int(step.get("time_dim", 4))
    if len(loaded) <= time_column:
        raise ArchiveError(
            f"{_SWEEPS} writes the time to column {time_column} of the points, but LoadPointsFromFile takes "
            f"{len(loaded)} columns; set its use_dim"
        )
    return SweepSpec(
        number=int(step.get("sweeps_num", 10)),
        load_dim=int(step.get("load_dim", 5)),
        time_column=loaded[time_column],
        repeats=bool(step.get("pad_empty_sweeps", False)),
    )


def _expected_points(config: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]]) -> PointExpectations:
    """Return what the model expects of a point cloud, from its voxels and its data set."""
    loader, preprocessor = steps["LoadPointsFromFile"], config["model"].get("data_preprocessor") or {}
    bounds = (preprocessor.get("voxel_layer") or {}).get("point_cloud_range")
    if preprocessor.get("voxel_type", "hard") not in ("hard", "dynamic"):  # others divide polar coordinates
        bounds = None
    has_colour = "DEPTH" in str(loader.get("coord_type", "LIDAR")).upper()
    uses = 3 in _used_columns(steps) and not has_colour
    if (step := steps.get(_SWEEPS)) is not None:
        use_dim = step.get("use_dim", (0, 1, 2, 4))
        uses = uses and 3 in (range(use_dim) if isinstance(use_dim, int) else use_dim)
    dataset = str(dataset_of(config).get("type", "")).lower()
    scale = next((top for word, top in INTENSITY_MAX.items() if word in dataset), None)
    return PointExpectations(
        point_cloud_range=tuple(float(bound) for bound in bounds) if bounds and len(bounds) == 6 else None,
        intensity_max=None if loader.get("norm_intensity") else scale,
        uses_intensity=uses,
    )


def _kind(step: Mapping[str, Any], scope: str) -> str:
    """Name of a step; of a user's class the name of upstream's step that it derives from, if that is a known one."""
    derived = _derived(step, scope)
    return derived[1] if derived else str(step["type"]).rpartition(".")[2]


def _derived(step: Mapping[str, Any], scope: str) -> tuple[type, str] | None:
    """Return the class of a step and the known step of upstream's that it derives from; None for any other step."""
    with suppress_warnings():
        found = importlib.import_module(f"{scope}.registry").TRANSFORMS.get(str(step["type"]))
    if not isinstance(found, type) or _is_upstreams(found):
        return None
    for base in found.__mro__[1:]:
        is_known = base.__name__ in _KNOWN or base.__name__.startswith(ANNOTATION_LOADERS)
        if is_known and _is_upstreams(base):
            return found, base.__name__
    return None


def _is_upstreams(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("mmcv", "mmdet", "mmdet3d")


def _effective(step: Mapping[str, Any], scope: str) -> Mapping[str, Any]:
    """Return a step with the settings that a user's class gives itself.

    Raises:
        ArchiveError: the class cannot be created.
    """
    derived = _derived(step, scope)
    if derived is None or derived[1] not in LOADERS:
        return step
    try:
        made = derived[0](**{key: value for key, value in step.items() if key != "type"})
    except Exception as error:  # a foreign constructor may raise anything
        raise ArchiveError(
            f"the loading step {step['type']} cannot be created: {type(error).__name__}: {error}"
        ) from error
    own = {name: getattr(made, name) for name in _LOADER_SETTINGS if hasattr(made, name)}
    return {**step, **own}


def _matrices(config: Mapping[str, Any], box_type: str) -> tuple[str, ...]:
    """Return the projection matrices of a detector that lifts an image to 3D; empty for a 2D detector."""
    if config["model"].get("coord_type") is None:
        return ()
    return ("depth2img",) if box_type == "Depth" else ("lidar2img",)


def _image_decoding(steps: Mapping[str, Mapping[str, Any]]) -> tuple[str, Decoder]:
    """Return the colour type and the decoder of the pipeline's image loader."""
    for kind, usual in (
        ("LoadImageFromFile", "color"),
        ("LoadImageFromFileMono3D", "color"),
        ("LoadMultiViewImageFromFiles", "unchanged"),
    ):
        if kind in steps:
            color_type = str(steps[kind].get("color_type", usual))
            match color_type, steps[kind].get("imdecode_backend"):
                case _, None | "cv2" if color_type in COLOR_TYPES:
                    return color_type, "cv2"
                case "color", "pillow":
                    return color_type, "pillow"
            raise ArchiveError(
                f"unsupported image loader {dict(steps[kind])}: color_type must be one of {sorted(COLOR_TYPES)}, "
                "imdecode_backend cv2, or pillow for color"
            )
    return "color", "cv2"


def _cameras(config: Mapping[str, Any], loader: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the cameras from the data set's folders, else numbered names.

    Raises:
        ArchiveError: the model needs earlier frames.
    """
    if int(loader.get("num_ref_frames", -1)) > 0:
        raise ArchiveError("the model cannot be served frame by frame: it needs earlier frames")
    count = int(loader.get("num_views", 5))
    prefixes = dataset_of(config).get("data_prefix") or {}
    named = tuple(str(name) for name in prefixes if str(name).upper().startswith("CAM"))
    return named if len(named) == count else tuple(f"CAM{i}" for i in range(count))


class InputPipeline:
    """Pipeline from a frame to the input of ``model.test_step``; one per model, not thread-safe."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the pipeline of a resolved `config`; raises like `frame_spec`."""
        self.spec = frame_spec(config)
        with suppress_warnings():
            from mmengine.dataset import Compose
            from mmengine.registry import DefaultScope

            with DefaultScope.overwrite_default_scope(scope_of(config)):
                self._constants = _constants(config)
                steps = resolve_objects(copy.deepcopy(pipeline_of(config)))
                self._compose = Compose(_replace_loaders(steps, scope_of(config)))

    def expect_intensities_of(self, frame: Frame) -> None:
        """Expect intensities of the scale of `frame`, a user's own, if the data set does not tell it."""
        expected = self.spec.expected
        if frame.points is None or expected.intensity_max is not None or not expected.uses_intensity:
            return
        if not _is_sample_scene(frame.points):
            expected = replace(expected, intensity_max=intensity_scale(frame.points))
            self.spec = replace(self.spec, expected=expected)

    def build(self, frame: Frame) -> dict[str, Any]:
        """Run the pipeline on one frame.

        Raises:
            ArchiveError: the pipeline creates several samples (test-time augmentation).
        """
        data = frame.data if isinstance(frame.data, dict) else {self.spec.parts[0]: frame.data}
        inputs: dict[str, Any] = {key: copy.copy(value) for key, value in self._constants.items()}
        inputs.update(_loader_inputs(data, self.spec))
        inputs["sweeps_accumulated"] = frame.options.sweeps == ACCUMULATED
        sample: Any = self._compose(inputs)
        if not isinstance(sample, dict):
            raise ArchiveError(
                "the test pipeline augments its frame; only pipelines without flips and scales are supported"
            )
        return sample


def _is_sample_scene(points: npt.NDArray[np.float32]) -> bool:
    """Return whether a cloud is the synthetic golden frame, whose intensities tell nothing about a model."""
    sample = np.frombuffer(_SAMPLE.read_bytes(), dtype="<f4").reshape(-1, 4)
    return bool(np.array_equal(points[:, :3], sample[:, :3]))


def _replace_loaders(pipeline: Sequence[dict[str, Any]], scope: str) -> list[Any]:
    steps: list[Any] = []
    for step in pipeline:
        kind, derived = _kind(step, scope), _derived(step, scope)
        if kind.startswith(ANNOTATION_LOADERS):
            continue
        if kind not in LOADERS:
            steps.append(step)
        elif derived:
            steps.append(derived_loader(step, *derived))
        else:
            steps.append(LOADERS[kind](step))
    return steps


def _loader_inputs(data: Mapping[str, Any], spec: FrameSpec) -> dict[str, Any]:
    """Build the inputs of the loaders, with the keys of mmdet's and mmdet3d's own inference functions."""
    inputs: dict[str, Any] = {}
    if "points" in data:
        inputs["lidar_points"] = {"lidar_path": data["points"]}
    if "sweeps" in data:
        inputs.update(_sweep_inputs(data["sweeps"]))
    if "image" in data:
        inputs["img"] = data["image"]
    matrices: Mapping[str, Any] = data.get("calibration") or {}
    if spec.cameras:
        inputs["images"] = {
            camera: {"img": data[f"image.{camera}"], **_rows(matrices[camera])} for camera in spec.cameras
        }
    else:
        inputs.update({name: np.array(matrix) for name, matrix in matrices.items()})
    return inputs


def _sweep_inputs(sweeps: Sequence[Sweep]) -> dict[str, Any]:
    """Build mmdet3d's entries of sweeps; relative to the key frame, so that its difference of times is exact."""
    return {
        "timestamp": 0.0,
        "lidar_sweeps": [
            {
                "timestamp": -sweep.time_lag_s,
                "lidar_points": {"lidar_path": sweep.points, "lidar2sensor": sweep.lidar2sensor},
            }
            for sweep in sweeps
        ],
    }


def _rows(matrices: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    # The pipeline scales camera matrices in place; the frame belongs to the caller.
    return {name: np.array(matrix) for name, matrix in matrices.items()}


def _constants(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that `mmdet3d.apis` and `mmdet.apis` add to a frame."""
    if scope_of(config) != "mmdet3d":
        return {"img_id": 0}
    from mmdet3d.structures import get_box_type

    box_type_3d, box_mode_3d = get_box_type(box_type_of(config))
    return {
        "img_id": 0,
        "timestamp": 1,
        "axis_align_matrix": np.eye(4),
        "box_type_3d": box_type_3d,
        "box_mode_3d": box_mode_3d,
    }
