"""Bring configs of MMDetection 2.x and MMDetection3D 0.x / 1.0.0rc to today's form.

Only what serving needs is converted: the model, the test pipeline and the class names. The old form keeps data sets in
``data = dict(train=…, val=…, test=…)``, normalises and pads in the pipeline, wraps the test pipeline in
``MultiScaleFlipAug`` and has voxel layers inside the model; today's form has ``test_dataloader``, a
``data_preprocessor`` and plain pipelines. Old and new names after the migration guides of mmdet 3.0 and mmdet3d 1.1.

What is converted is reported in one line; what cannot be converted raises an `ArchiveError` that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from serve.convert.legacy_pipeline import Step, as_plain, modernize_pipeline, packed_keys, packed_meta_keys
from serve.errors import ArchiveError

__all__ = ["Modernized", "is_legacy", "modernize", "package_of"]

# Wrappers of data sets by the member that holds what they wrap.
_WRAPPED = ("dataset", "datasets")
_VOXEL_LAYERS = ("voxel_layer", "pts_voxel_layer")
_DYNAMIC = ("DynamicVoxelNet", "DynamicMVXFasterRCNN")
# Members of a model that only training reads.
_TRAINING_ONLY = ("pretrained", "input_size", "random_size_range", "random_size_interval", "init_cfg")
# Members that were renamed (to a new name) or dropped (None), by type; heads of the same family inherit by name.
_MEMBERS: Mapping[str, Mapping[str, str | None]] = {
    "CTResNetNeck": {"in_channel": "in_channels"},
    "CenterNetHead": {"in_channel": "in_channels", "feat_channel": "feat_channels"},
    "FCAF3DHead": {"n_classes": "num_classes", "n_reg_outs": "num_reg_outs"},
    "H3DBboxHead": {"feat_channels": None},
    "ImVoxelNet": {"anchor_generator": "prior_generator"},
    "MinkSingleStage3DDetector": {"voxel_size": None, "head": "bbox_head"},
    "NASFPN": {"add_extra_convs": None},
    "PartAggregationROIHead": {"part_roi_extractor": "bbox_roi_extractor"},
    "PointRCNNRoIHead": {"point_roi_extractor": "bbox_roi_extractor"},
    "SSD3DHead": {"in_channels": None, "conv_cfg": None, "norm_cfg": None},
    "StageCascadeRPNHead": {"sampling": None},
    "VoteHead": {"conv_cfg": None, "norm_cfg": None},
}
# Losses that mmdet3d's classes name by default without the package that has them; inference builds them only.
_UNQUALIFIED_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "PointRCNNBboxHead": {
        "loss_bbox": {"type": "mmdet.SmoothL1Loss", "reduction": "sum"},
        "loss_cls": {"type": "mmdet.CrossEntropyLoss", "use_sigmoid": True, "reduction": "sum"},
    },
}
# Distillation: the student answers, and is what the checkpoint holds.
_DISTILLED = {"KnowledgeDistillationSingleStageDetector": "SingleStageDetector", "LAD": "PAA"}
# Models whose insides were rearranged, with a new meaning of the same members.
_REARRANGED = frozenset(
    (
        "DETR",
        "DeformableDETR",
        "ConditionalDETR",
        "DABDETR",
        "MaskFormer",
        "Mask2Former",
        "YOLACT",
        "YOLACTHead",
    )
)


class Modernized(NamedTuple):
    """A config in today's form.

    Attributes:
        config: its members, as plain dictionaries.
        notes: one line on what was converted, and one for each thing that serving leaves out.
    """

    config: dict[str, Any]
    notes: tuple[str, ...]


def is_legacy(config: Mapping[str, Any]) -> bool:
    """Whether a config is of MMDetection 2.x, MMDetection3D 0.x or 1.0.0rc."""
    data = config.get("data")
    if isinstance(data, Mapping) and any(
        isinstance(data.get(split), Mapping | list) for split in ("train", "val", "test")
    ):
        return True
    model = config.get("model")
    return isinstance(model, Mapping) and any(name in model for name in _VOXEL_LAYERS)


def package_of(config: Mapping[str, Any]) -> str:
    """Package of a config that names no scope, as old ones seldom do: by its steps and its model."""
    if config.get("default_scope"):
        return str(config["default_scope"])
    model = config["model"]
    named = str(model.get("type")).partition(".")[0]
    if named in ("mmdet", "mmdet3d"):
        return named
    dataset = _test_dataset(config) or _today_dataset(config)
    steps = dataset.get("pipeline") or config.get("test_pipeline") or ()
    kinds = {str(step.get("type")) for step in steps if isinstance(step, Mapping)}
    in_3d = any(name in model for name in _VOXEL_LAYERS) or any(
        kind.endswith("3D") or "LoadPoints" in kind or "Pack3DDet" in kind for kind in kinds
    )
    return "mmdet3d" if in_3d or _is_only_in_mmdet3d(model) else "mmdet"


def modernize(config: Mapping[str, Any], package: str, *, training: bool = False) -> Modernized:
    """Convert a legacy config.

    Args:
        config: the resolved config (after ``_base_``).
        package: ``mmdet`` or ``mmdet3d``.
        training: keep what only training reads of the model: its ``train_cfg`` and initial weights.

    Raises:
        ArchiveError: something cannot be converted; the message names it.
    """
    notes: list[str] = []
    dataset = _test_dataset(config)
    steps = [dict(step) for step in dataset.get("pipeline") or config.get("test_pipeline") or ()]
    if not steps:
        raise ArchiveError(
            "the config is in the form of mmdet 2.x / mmdet3d 0.x and has no data.test.pipeline: nothing says how a "
            "frame is prepared; add the test pipeline"
        )
    if not isinstance(config.get("model"), Mapping):
        raise ArchiveError("the config has no model")
    model = copy.deepcopy(as_plain(config["model"]))
    _check_rearranged(model)
    if package == "mmdet3d" and _is_of_mmdet(model):
        package = "mmdet"
    for name in ("train_cfg", "test_cfg"):
        if config.get(name) is not None and model.get(name) is None and not _is_loop(config[name]):
            model[name] = copy.deepcopy(as_plain(config[name]))
    if training:
        _modernize_training(model)
    else:
        model["train_cfg"] = None
    flat, normalization, padding = modernize_pipeline(steps, notes)
    model["data_preprocessor"] = _preprocessor(model, package, normalization, padding)
    for _, part in _parts(model):
        for name in () if training else _TRAINING_ONLY:
            part.pop(name, None)
        for name, now in _MEMBERS.get(str(part.get("type", "")).rpartition(".")[2], {}).items():
            if name in part:
                value = part.pop(name)
                if now is not None:
                    part.setdefault(now, value)
    _keep_student(model, notes)
    if model.get("type") == "ImVoxelNet":
        model.setdefault("coord_type", "DEPTH" if "Depth" in str(dataset.get("box_type_3d", "")) else "LIDAR")
    if package == "mmdet3d":
        _turn_anchors(model, notes)
        _qualify(model)
    packed = {
        "type": "Pack3DDetInputs" if package == "mmdet3d" else "PackDetInputs",
        **({"keys": packed_keys(flat)} if package == "mmdet3d" else {"meta_keys": packed_meta_keys(flat)}),
    }
    pipeline = [*flat, packed]
    members = {
        name: as_plain(value)
        for name, value in config.items()
        if name not in ("data", "train_cfg", "test_cfg", "test_pipeline", "train_pipeline", "model")
    }
    today = {
        **members,
        "default_scope": package,
        "model": model,
        "test_pipeline": pipeline,
        "test_dataloader": {"dataset": _dataset({**_base_dataset(config), **dataset}, pipeline)},
    }
    notes.insert(
        0,
        f"the config is of {'mmdet 2.x' if package == 'mmdet' else 'mmdet3d 0.x / 1.0.0rc'}: "
        "model and test pipeline were converted to today's form",
    )
    return Modernized(today, tuple(notes))


def _modernize_training(model: dict[str, Any]) -> None:
    """Keep what training reads under today's names: initial weights, sizes drawn per batch, assigners of 3D boxes."""
    for where, part in list(_parts(model)):
        weights = part.pop("pretrained", None)
        backbone = part.get("backbone") if not where else part
        overlaps = part.get("iou_calculator")
        of_3d = isinstance(overlaps, dict) and str(overlaps.get("type")).endswith("3D")
        if of_3d and part.get("type") == "MaxIoUAssigner":
            part["type"] = "Max3DIoUAssigner"
        if weights and isinstance(backbone, dict):
            backbone.setdefault("init_cfg", {"type": "Pretrained", "checkpoint": weights})
    size = model.pop("input_size", None)
    drawn, interval = model.pop("random_size_range", None), model.pop("random_size_interval", 10)
    if size is not None and drawn is not None:
        low, high = (32 * int(side) for side in drawn)
        augment = {"type": "BatchSyncRandomResize", "random_size_range": (low, high), "size_divisor": 32}
        model.setdefault("data_preprocessor", {})["batch_augments"] = [{**augment, "interval": interval}]


def _is_loop(value: Any) -> bool:
    """Whether a ``train_cfg`` or ``test_cfg`` is mmengine's loop, not the model's settings."""
    return isinstance(value, Mapping) and str(value.get("type", "")).endswith("Loop")


def _test_dataset(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the data set of the test split inside its wrappers."""
    data = config.get("data") or {}
    found: Any = next((data[split] for split in ("test", "val") if data.get(split) is not None), {})
    while True:
        if isinstance(found, list | tuple):
            found = found[0] if found else {}
        wrapped = next(
            (found[name] for name in _WRAPPED if isinstance(found.get(name), Mapping | list)), None
        )
        if wrapped is None or found.get("pipeline"):
            return as_plain(found)  # type: ignore[no-any-return]
        found = wrapped


def _today_dataset(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the data set of a config, or of a base, in today's form."""
    found: Any = config.get("test_dataloader") or {}
    while isinstance(found, Mapping) and isinstance(found.get("dataset"), Mapping):
        found = found["dataset"]
    return found if isinstance(found, Mapping) else {}


def _base_dataset(config: Mapping[str, Any]) -> dict[str, Any]:
    """Type and class names of a base in today's form below an old config."""
    found = _today_dataset(config)
    known = {name: found[name] for name in ("type", "modality", "box_type_3d") if name in found}
    classes = (
        (found.get("metainfo") or {}).get("classes") if isinstance(found.get("metainfo"), Mapping) else None
    )
    return {**known, **({"classes": classes} if classes is not None else {})}


def _dataset(dataset: Mapping[str, Any], pipeline: Sequence[Step]) -> dict[str, Any]:
    """Keep type, class names and pipeline of a data set, in today's form."""
    kept = {
        name: dataset[name]
        for name in ("type", "modality", "box_type_3d", "load_interval")
        if name in dataset
    }
    classes = dataset.get("classes")
    if classes is not None:
        kept["metainfo"] = {"classes": classes}
    return {**kept, "pipeline": list(pipeline)}


def _check_rearranged(model: Mapping[str, Any]) -> None:
    for _, part in _parts(dict(model)):
        kind = str(part.get("type", "")).rpartition(".")[2]
        old = "transformer" in part or "transformer_decoder" in part or "segm_head" in part
        if old and (kind in _REARRANGED or kind.endswith("Head")):
            raise ArchiveError(
                f"{model.get('type')} of mmdet 2.x keeps its parts in places that mmdet 3 lacks ({kind}); write "
                "the config on top of the zoo's present one, and convert the checkpoint with mmdet's model converters"
            )


def _parts(model: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary in a model, with its path."""
    yield path, model
    for name, value in model.items():
        inner = value if isinstance(value, list | tuple) else [value]
        for one in inner:
            if isinstance(one, dict):
                yield from _parts(one, f"{path}.{name}" if path else str(name))


# The model


def _preprocessor(
    model: dict[str, Any], package: str, normalization: Step | None, padding: Sequence[Step]
) -> dict[str, Any]:
    """Build the data preprocessor, which normalises, pads and voxelises."""
    made: dict[str, Any] = {
        "type": "Det3DDataPreprocessor" if package == "mmdet3d" else "DetDataPreprocessor"
    }
    made.update(model.get("data_preprocessor") or {})  # an old config on top of a base in today's form
    layers = [model.pop(name) for name in _VOXEL_LAYERS if name in model]
    if layers:
        layer = layers[0]
        is_dynamic = model.get("type") in _DYNAMIC or layer.get("max_num_points") == -1
        made.update(voxel=True, voxel_type="dynamic" if is_dynamic else "hard", voxel_layer=layer)
    if normalization is not None:
        made.update(
            mean=list(normalization["mean"]),
            std=list(normalization["std"]),
            bgr_to_rgb=bool(normalization.get("to_rgb", True)),
        )
    divisors = [step["size_divisor"] for step in padding]
    if divisors:
        made["pad_size_divisor"] = max(divisors)
    return made


def _turn_anchors(model: MutableMapping[str, Any], notes: list[str]) -> None:
    """Anchors of the LiDAR box frame before mmdet3d 1.0.0rc0: sizes were (width, length, height).

    As in `serve.convert.legacy_weights`, the frame shows in the anchors: every one is narrower along x than along y.
    """
    head = model.get("bbox_head")
    generator = head.get("anchor_generator") if isinstance(head, dict) else None
    sizes = generator.get("sizes") if isinstance(generator, dict) else None
    if (
        not isinstance(head, dict)
        or not isinstance(generator, dict)
        or not sizes
        or "Anchor3D" not in str(generator.get("type"))
    ):
        return
    if any(len(size) < 3 or size[0] > size[1] for size in sizes) or all(size[0] == size[1] for size in sizes):
        return
    generator["sizes"] = [[length, width, *rest] for width, length, *rest in sizes]
    if not head.get("dir_offset"):
        head.pop("dir_offset", None)  # today's default is a quarter turn
    notes.append(
        "the anchors were turned from the box frame before mmdet3d 1.0.0rc0: (width, length) to (length, width)"
    )


def _keep_student(model: dict[str, Any], notes: list[str]) -> None:
    if (now := _DISTILLED.get(str(model.get("type")))) is None:
        return
    notes.append(f"{model['type']} distils: the student is served, as {now}")
    model["type"] = now
    for name in [name for name in model if name.startswith(("teacher", "output_feature", "eval_teacher"))]:
        del model[name]


def _is_only_in_mmdet3d(model: Mapping[str, Any]) -> bool:
    """Whether only mmdet3d has a detector of this type."""
    import mmdet.models  # noqa: F401
    import mmdet3d.models  # noqa: F401
    from mmdet.registry import MODELS as MMDET_MODELS
    from mmdet3d.registry import MODELS

    kind = str(model.get("type"))
    return kind in MODELS.module_dict and kind not in MMDET_MODELS.module_dict


def _is_of_mmdet(model: Mapping[str, Any]) -> bool:
    """Whether the detector is one of mmdet's, as in mmdet3d's configs for nuImages."""
    import mmdet.models  # noqa: F401
    import mmdet3d.models  # noqa: F401
    from mmdet.registry import MODELS as MMDET_MODELS
    from mmdet3d.registry import MODELS

    kind = str(model.get("type"))
    return kind not in MODELS.module_dict and kind in MMDET_MODELS.module_dict


def _qualify(model: dict[str, Any]) -> None:
    """Name mmdet's modules in an mmdet3d model by their package, which its registries require today."""
    from mmdet3d.registry import MODELS, TASK_UTILS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    import mmdet.models  # noqa: F401
    import mmdet3d.models  # noqa: F401
    from mmdet.registry import MODELS as MMDET_MODELS
    from mmdet.registry import TASK_UTILS as MMDET_UTILS

    for _, part in _parts(model):
        kind = part.get("type")
        for name, default in _UNQUALIFIED_DEFAULTS.get(str(kind), {}).items():
            part.setdefault(name, dict(default))
        if (
            not isinstance(kind, str)
            or "." in kind
            or kind in MODELS.module_dict
            or kind in TASK_UTILS.module_dict
        ):
            continue
        if kind in MMDET_MODELS.module_dict or kind in MMDET_UTILS.module_dict:
            part["type"] = f"mmdet.{kind}"
            if kind.endswith(("RoIHead", "RPNHead")):
                part["_scope_"] = "mmdet"  # what they build by default, as Linear, is mmdet's too
