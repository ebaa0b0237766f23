"""Bring the test pipelines of MMDetection 2.x and MMDetection3D 0.x to today's form.

The old form normalises and pads in the pipeline, wraps the steps in ``MultiScaleFlipAug`` and packs them by several
steps; today's form leaves normalising and padding to the model's ``data_preprocessor``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serve.errors import ArchiveError

__all__ = ["Step", "as_plain", "is_still", "modernize_pipeline", "packed_keys", "packed_meta_keys"]

Step = dict[str, Any]

# Wrappers around the steps of a test pipeline, with all scales and flips.
_AUGMENTERS = ("MultiScaleFlipAug", "MultiScaleFlipAug3D")
# Steps that made tensors and data containers; packing does that today.
_PACKERS = (
    "DefaultFormatBundle",
    "DefaultFormatBundle3D",
    "ImageToTensor",
    "ToTensor",
    "ToDataContainer",
    "Collect",
    "Collect3D",
)
# Where training read its files; a server has its frames in memory.
_STORAGE = ("file_client_args", "backend_args")
_RENAMED_STEPS = {"IndoorPointSample": "PointSample"}


def as_plain(value: Any) -> Any:
    """Dictionaries and lists without mmengine's classes around them."""
    if isinstance(value, Mapping):
        return {name: as_plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return (
            type(value)(as_plain(inner) for inner in value)
            if type(value) in (list, tuple)
            else list(map(as_plain, value))
        )
    return value


def modernize_pipeline(steps: Sequence[Step], notes: list[str]) -> tuple[list[Step], Step | None, list[Step]]:
    """Convert steps to today's form without packing; returns also the normalisation and the paddings."""
    flat: list[Step] = []
    normalization: Step | None = None
    padding: list[Step] = []
    for step in _unwrapped(steps, notes):
        kind = str(step["type"]).rpartition(".")[2]
        step["type"] = _RENAMED_STEPS.get(kind, step["type"])
        if kind in _PACKERS or _is_identity(kind, step):
            continue
        if kind == "Normalize":
            normalization = step
        elif kind == "Pad" and step.get("size_divisor") is not None and not step.get("pad_val"):
            padding.append(step)
        elif kind == "Pad":
            flat.append(_pad(step, normalization))
        else:
            flat.append(_rename_members(kind, step))
    if any(step["type"] == "Pad" for step in flat) and normalization is not None:
        for step in flat:
            if str(step["type"]).startswith("LoadImage"):
                step["to_float32"] = True  # the padding is the mean, exactly
    return flat, normalization, padding


def _unwrapped(steps: Sequence[Step], notes: list[str]) -> Iterator[Step]:
    for step in steps:
        kind = str(step.get("type", "")).rpartition(".")[2]
        if kind not in _AUGMENTERS:
            if kind == "LoadProposals":
                raise ArchiveError(
                    "the pipeline loads proposals from a file (LoadProposals): such models are not served"
                )
            yield {name: as_plain(value) for name, value in step.items() if name not in _STORAGE}
            continue
        scales = step.get("img_scale")
        many = isinstance(scales, list) and len(scales) > 1
        factors = step.get("scale_factor")
        if many or step.get("flip") or (isinstance(factors, list) and len(factors) > 1):
            notes.append(f"test-time augmentation ({kind}) is left out: one scale, no flip")
        scale = (
            scales[0]
            if isinstance(scales, list) and scales and isinstance(scales[0], list | tuple)
            else scales
        )
        for inner in step.get("transforms", ()):
            one = {name: as_plain(value) for name, value in inner.items()}
            if str(one.get("type", "")).rpartition(".")[2] == "Resize" and not {"img_scale", "scale"} & set(
                one
            ):
                if scale is not None:
                    one["scale"] = tuple(scale)
                elif factors is not None:
                    one["scale_factor"] = factors[0] if isinstance(factors, list) else factors
            yield one


def _rename_members(kind: str, step: Step) -> Step:
    """Rename or drop the members of a step that today's step of that name lacks."""
    if kind == "AffineResize":
        return step
    if "img_scale" in step:
        step["scale"] = step.pop("img_scale")
    if kind == "Resize":
        # Only training drew one of several scales; the augmenter around the step has chosen one.
        for name in ("multiscale_mode", "ratio_range", "override"):
            step.pop(name, None)
        if "bbox_clip_border" in step:
            step["clip_object_border"] = step.pop("bbox_clip_border")
    return step


def _is_identity(kind: str, step: Step) -> bool:
    """Whether a random step does nothing at test time: no flip, no turn, no change of scale."""
    if kind in ("RandomFlip", "RandomFlip3D"):
        return True  # flips were decided by the augmenter around it
    return kind == "GlobalRotScaleTrans" and is_still(step)


def is_still(step: Mapping[str, Any]) -> bool:
    """Whether a ``GlobalRotScaleTrans`` neither turns, scales nor moves a frame."""
    turns, scales, moves = (step.get(name) for name in ("rot_range", "scale_ratio_range", "translation_std"))
    turn = turns if isinstance(turns, list | tuple) else (turns or 0,)
    move = moves if isinstance(moves, list | tuple) else (moves or 0,)
    return not any(turn) and set(scales or (1,)) == {1} and not any(move)


def _pad(step: Step, normalization: Step | None) -> Step:
    """Convert a padding that stays in the pipeline; normalisation comes after it now, so it pads with the mean."""
    value = step.get("pad_val", 0)
    image = value.get("img", 0) if isinstance(value, dict) else value
    if normalization is not None and not any(image if isinstance(image, list | tuple) else (image,)):
        mean = list(normalization["mean"])
        image = tuple(reversed(mean)) if normalization.get("to_rgb", True) else tuple(mean)
    if isinstance(image, list):
        image = tuple(image)
    return {**step, "pad_val": {"img": image}}


def packed_keys(flat: Sequence[Step]) -> list[str]:
    """Name what ``Pack3DDetInputs`` has to pack: points, images or both."""
    kinds = {str(step["type"]).rpartition(".")[2] for step in flat}
    keys = ["points"] if "LoadPointsFromFile" in kinds else []
    return keys + (
        ["img"]
        if any(kind.startswith("LoadImage") or kind.startswith("LoadMultiView") for kind in kinds)
        else []
    )


def packed_meta_keys(flat: Sequence[Step]) -> tuple[str, ...]:
    """Name what ``PackDetInputs`` has to record of a frame; corner detectors map their boxes back by the border."""
    kinds = {str(step["type"]).rpartition(".")[2] for step in flat}
    usual = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    return (*usual, "border") if "RandomCenterCropPad" in kinds else usual
