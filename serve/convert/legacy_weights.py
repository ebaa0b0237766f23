"""Adapt the weights of a checkpoint to a model: old kernel layouts, the old box frame, leftover keys.

Changes since mmdet 2 / mmdet3d 0.x that are undone here:

* sparse 3D kernels: mmcv and spconv 1 store (kx, ky, kz, in, out), spconv 2 stores (out, kx, ky, kz, in);
* the LiDAR box frame before mmdetection3d 1.0.0rc0: sizes were (w, l, h), yaw was -yaw - pi/2 of the present
  frame, and anchors likewise. The last layers of an `Anchor3DHead` are linear in both, so they convert exactly.

Key names of SECOND and PointPillars did not change. Modules whose keys did change (FCOS, VFNet, FCAF3D, two-stage
detectors) rename them while loading, which `adapt_and_load` preserves.

Checkpoints of mmdet 1.x (other class order) and of VoteNet/H3DNet before 0.6 are rejected with a pointer to
upstream's conversion scripts.
"""

from __future__ import annotations

import ast
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve.convert.checkpoint import Checkpoint
from serve.errors import CheckpointError

__all__ = [
    "KeyReport",
    "adapt_and_load",
    "adapt_state_dict",
    "compare_keys",
    "convert_anchor_head",
    "shapes_of",
    "versions_of",
]

Shape = tuple[int, ...]
_TO_SPCONV2: Shape = (4, 0, 1, 2, 3)
_TO_MMCV: Shape = (1, 2, 3, 4, 0)
_SIZE_MISMATCH = re.compile(r"size mismatch for ([^\s:]+):")
_SIZES = re.compile(r"\bsizes\s*=\s*(\[\s*\[[\d.,\s\[\]]*\]\s*,?\s*\])")
_ROTATIONS = re.compile(r"\brotations\s*=\s*(\[[\d.,\s]*\])")
_DIR_OFFSET = re.compile(r"\bdir_offset\s*=\s*(-?[\d.]+)")
_BOX = 7
_OLD_FRAME = "the LiDAR box frame before mmdetection3d 1.0.0rc0"


@dataclass(frozen=True)
class KeyReport:
    """Differences between the keys of a checkpoint and of a model, ``num_batches_tracked`` excepted."""

    missing: tuple[str, ...] = ()
    """Weights of the model that the checkpoint lacks; they keep their initial values."""
    unexpected: tuple[str, ...] = ()
    """Weights of the checkpoint that the model lacks."""
    misshapen: tuple[tuple[str, str], ...] = ()
    """(key, problem) of weights present on both sides with different shapes."""
    notes: tuple[str, ...] = ()
    """Remarks on adaptations."""

    @property
    def ok(self) -> bool:
        """Whether all keys and shapes are the same."""
        return not (self.missing or self.unexpected or self.misshapen)

    def summary(self, limit: int = 20) -> str:
        """List the differences, one key per line, at most `limit` keys of each kind."""
        misshapen = [f"{key} ({problem})" for key, problem in self.misshapen]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", misshapen))
        lines: list[str] = []
        for title, keys in kinds:
            if keys:
                more = [f"    … and {len(keys) - limit} more"] if len(keys) > limit else []
                lines += [f"{len(keys)} {title}:", *(f"    {key}" for key in keys[:limit]), *more]
        return "\n".join(lines) or "all weights fit"


def shapes_of(model: torch.nn.Module) -> dict[str, Shape]:
    """Shapes of all tensors in the model's state dict, by key."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}


def versions_of(model: torch.nn.Module) -> dict[str, int]:
    """Read module path → version, as torch records it with weights saved now.

    Formats other than torch's (safetensors) lose the versions; without them, modules that once renamed their keys
    rename them again, wrongly.
    """
    metadata: Mapping[str, Mapping[str, Any]] = getattr(model.state_dict(), "_metadata", {})
    pairs = ((name, entry.get("version")) for name, entry in metadata.items())
    return {name: version for name, version in pairs if isinstance(version, int)}


def compare_keys(state_dict: Mapping[str, torch.Tensor], expected_shapes: Mapping[str, Shape]) -> KeyReport:
    """Compare names and shapes, without the renaming that modules do while loading."""
    have = {name: tuple(value.shape) for name, value in state_dict.items()}
    misshapen = [
        (name, f"{have[name]} in the checkpoint, {tuple(shape)} in the model")
        for name, shape in expected_shapes.items()
        if name in have and have[name] != tuple(shape)
    ]
    return KeyReport(
        _drop_counters(name for name in expected_shapes if name not in have),
        _drop_counters(name for name in have if name not in expected_shapes),
        tuple(misshapen),
    )


def adapt_state_dict(
    state_dict: Mapping[str, torch.Tensor], expected_shapes: Mapping[str, Shape]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Permute sparse 3D kernels to the layout of the model.

    A 5-dimensional weight is permuted if its shape then equals the expected one. The shape of a kernel whose five
    sizes are all equal says nothing: it follows the other kernels of its part of the model (first word of the key),
    and is left unchanged if there are none.

    Args:
        state_dict: name → weight; not modified, unchanged weights are shared.
        expected_shapes: name → shape in the model (see `shapes_of`).

    Returns:
        The weights, and remarks on the changes.
    """
    orders: dict[str, tuple[int, ...]] = {}
    ambiguous: list[str] = []
    for name, shape in expected_shapes.items():
        weight = state_dict.get(name)
        if weight is None or weight.dim() != 5 or len(shape) != 5:
            continue
        if tuple(weight.shape) == tuple(shape):
            if len(set(shape)) == 1 and shape[0] > 1:
                ambiguous.append(name)
            continue
        for order in (_TO_SPCONV2, _TO_MMCV):
            if tuple(weight.shape[axis] for axis in order) == tuple(shape):
                orders[name] = order
    parts: dict[str, set[tuple[int, ...]]] = {}
    for name, order in orders.items():
        parts.setdefault(name.split(".")[0], set()).add(order)
    for name in ambiguous:
        seen = parts.get(name.split(".")[0], set())
        if len(seen) == 1:
            orders[name] = next(iter(seen))

    adapted = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        adapted._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for name, order in orders.items():
        adapted[name] = state_dict[name].permute(order).contiguous()
    notes = []
    layouts = {_TO_SPCONV2: "spconv 2's (out, k, k, k, in)", _TO_MMCV: "mmcv's (k, k, k, in, out)"}
    for order, layout in layouts.items():
        if count := sum(each == order for each in orders.values()):
            notes.append(f"permuted {count} sparse kernels to {layout} layout")
    return adapted, tuple(notes)


def convert_anchor_head(
    state_dict: Mapping[str, torch.Tensor],
    prefix: str,
    *,
    sizes: int,
    old_rotations: Sequence[float],
    new_rotations: Sequence[float],
) -> dict[str, torch.Tensor]:
    """Convert the last layers of an `Anchor3DHead` from the box frame before mmdetection3d 1.0.0rc0.

    An old box is (x, y, z, w, l, h, yaw'), a present one (x, y, z, l, w, h, yaw) with yaw = -yaw' - pi/2
    (upstream's ``update_data_coords.py``). So an old anchor of rotation r' corresponds to the present anchor of
    rotation -r' - pi/2 (mod pi); the regressions of w and l are swapped; that of yaw is negated, plus the remainder
    between the two anchors' rotations (1.57, not pi/2); and the two direction bins are swapped, because they began
    at 0 and begin at -pi/2 now.

    Args:
        state_dict: not modified.
        prefix: of the head, with the dot: ``bbox_head.``.
        sizes: number of anchor sizes; rotations vary faster than sizes.
        old_rotations: rotations of the old anchors, radians.
        new_rotations: rotations of the present anchors, radians, equally many.

    Raises:
        CheckpointError: the two sets of rotations do not correspond, or the layers are not those of such a head
            (7 values per box, 2 direction bins).
    """
    to_new, remainders = _match_rotations(old_rotations, new_rotations)
    count = sizes * len(to_new)
    converted = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        converted._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for layer in ("conv_cls", "conv_reg", "conv_dir_cls"):
        for kind in ("weight", "bias"):
            name = f"{prefix}{layer}.{kind}"
            if name not in state_dict:
                continue
            old = state_dict[name]
            per_anchor = old.shape[0] // count
            fits = per_anchor * count == old.shape[0]
            if not fits or {"conv_reg": _BOX, "conv_dir_cls": 2}.get(layer, per_anchor) != per_anchor:
                raise CheckpointError(f"{name} has {old.shape[0]} channels, which do not fit {count} anchors")
            table = old.reshape(sizes, len(to_new), per_anchor, *old.shape[1:])
            new = torch.empty_like(table)
            for before, after in enumerate(to_new):
                new[:, after] = table[:, before]
                if layer == "conv_dir_cls":
                    new[:, after] = table[:, before].flip(1)
                elif layer == "conv_reg":
                    new[:, after, 3], new[:, after, 4] = table[:, before, 4], table[:, before, 3]
                    new[:, after, 6] = -table[:, before, 6]
                    if kind == "bias":
                        new[:, after, 6] += remainders[before]
            converted[name] = new.reshape(old.shape)
    return converted


def adapt_and_load(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    *,
    versions: Mapping[str, int] | None = None,
    allow_partial: bool = False,
) -> KeyReport:
    """Load the checkpoint's weights into the model, undoing known changes of layout and box frame.

    Modules rename their own former keys, as with mmengine's loader; unlike there, every difference is reported.

    Args:
        model: on any device; modified in place.
        checkpoint: from `serve.convert.checkpoint.load_checkpoint`.
        versions: module versions in place of the checkpoint's own: `versions_of` a model of the same class, for
            weights saved outside torch's format.
        allow_partial: load the weights that fit and report the others.

    Raises:
        CheckpointError: keys are missing, unexpected or misshapen (all are listed), or the weights are of a version
            that cannot be converted. With `allow_partial` neither is raised.
    """
    weights, notes = adapt_state_dict(checkpoint.state_dict, shapes_of(model))
    weights, frame_notes = _convert_box_frame(model, weights, checkpoint.meta, allow_partial=allow_partial)
    own = versions_of(model)
    known = dict(checkpoint.versions if versions is None else versions)
    for name, value in weights.items():
        # spconv's modules permute by version alone, and these weights are permuted already.
        owner = name.rpartition(".")[0]
        if value.dim() == 5 and owner in own:
            known[owner] = own[owner]
    missing, unexpected, errors = _load(model, weights, known)
    report = KeyReport(
        _drop_counters(missing),
        _drop_counters(unexpected),
        tuple(_parse_mismatch(error) for error in errors),
        (*checkpoint.notes, *notes, *frame_notes),
    )
    if not report.ok and not allow_partial:
        first = "the checkpoint does not fit the config (--allow-partial loads the weights that fit):"
        raise CheckpointError(f"{first}\n{report.summary()}")
    return report


def _drop_counters(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if "num_batches_tracked" not in name))


def _parse_mismatch(error: str) -> tuple[str, str]:
    """Key and problem from a module's message about a weight of another shape."""
    found = _SIZE_MISMATCH.search(error)
    text = " ".join(error.split())
    return (found.group(1), text[found.end() :].strip().rstrip(".")) if found else ("?", text)


def _load(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], versions: Mapping[str, int]
) -> tuple[list[str], list[str], list[str]]:
    """Walk the modules as torch's load_state_dict does, but collect problems instead of raising."""
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []

    def visit(module: torch.nn.Module, local: dict[str, torch.Tensor], prefix: str) -> None:
        version = versions.get(prefix.rstrip("."))
        metadata = {} if version is None else {"version": version}
        module._load_from_state_dict(local, prefix, metadata, True, missing, unexpected, errors)
        for name, child in module._modules.items():
            if child is not None:
                below = f"{prefix}{name}."
                visit(child, {key: value for key, value in local.items() if key.startswith(below)}, below)

    with torch.no_grad():
        visit(model, OrderedDict(weights), "")
    return missing, unexpected, errors


def _convert_box_frame(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], meta: Mapping[str, Any], *, allow_partial: bool
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Convert weights of the old box frame; reject versions that cannot be converted."""
    problem = ""
    # The first releases of mmdet3d wrote their own version under mmdet's name.
    in_3d = type(model).__module__.startswith("mmdet3d.")
    version = str(meta.get("mmdet3d_version") or meta.get("mmdet_version") or "")
    if not in_3d and version.startswith(("0.", "1.")):
        problem = (
            f"the checkpoint is of mmdetection {version}, whose class 0 is the background; upgrade it with mmdet's "
            "tools/model_converters/upgrade_model_version.py first"
        )
    elif (frame := _read_old_frame(meta)) is not None:
        generator = getattr(getattr(model, "bbox_head", None), "prior_generator", None)
        now = [[float(part) for part in size] for size in getattr(generator, "sizes", ())]
        if now == frame.sizes:
            return weights, (f"the config keeps the anchors of {_OLD_FRAME}",)
        if frame.is_convertible(model, now):
            converted = convert_anchor_head(
                weights,
                "bbox_head.",
                sizes=len(frame.sizes),
                old_rotations=frame.rotations,
                new_rotations=[float(rotation) for rotation in getattr(generator, "rotations", ())],
            )
            return converted, (f"converted the head from {_OLD_FRAME}",)
        problem = (
            f"the checkpoint was trained in {_OLD_FRAME}, and this model's head cannot be converted: width and "
            "length of its boxes would be swapped; use weights of 1.0.0 or later"
        )
    elif in_3d and version.startswith("0."):
        note = f"the checkpoint is of mmdetection3d {version}: its boxes may be in {_OLD_FRAME}"
        return weights, () if "Anchor3D" in str(meta.get("config")) else (note,)
    if problem and not allow_partial:
        raise CheckpointError(f"{problem} (--allow-partial continues nevertheless)")
    return weights, (problem,) if problem else ()


@dataclass(frozen=True)
class _OldFrame:
    """Anchors of a config from before the box frame changed."""

    sizes: list[list[float]]
    rotations: list[float]
    dir_offset: float

    def is_convertible(self, model: torch.nn.Module, sizes: list[list[float]]) -> bool:
        """Whether `convert_anchor_head` supports the model's head and the anchors are the same."""
        head = getattr(model, "bbox_head", None)
        names = (type(model).__name__, type(head).__name__)
        known = names in (("VoxelNet", "Anchor3DHead"), ("DynamicVoxelNet", "Anchor3DHead"))
        bins = self.dir_offset == 0.0 and abs(float(getattr(head, "dir_offset", 0.0)) + math.pi / 2) < 1e-3
        return known and bins and sizes == [[length, width, height] for width, length, height in self.sizes]


def _read_old_frame(meta: Mapping[str, Any]) -> _OldFrame | None:
    """Anchors of the recorded config if it is of the old box frame, else None.

    Recognised by the anchors, not by the version: no anchor is longer along x than along y, and one is shorter.
    """
    text = meta.get("config")
    if not isinstance(text, str) or "Anchor3D" not in text:
        return None
    sizes_text, rotations_text = _SIZES.search(text), _ROTATIONS.search(text)
    if not sizes_text or not rotations_text:
        return None
    try:
        sizes = [[float(part) for part in size] for size in ast.literal_eval(sizes_text.group(1))]
        rotations = [float(part) for part in ast.literal_eval(rotations_text.group(1))]
    except (ValueError, SyntaxError, TypeError):
        return None
    if not sizes or any(len(size) != 3 or size[0] > size[1] for size in sizes):
        return None
    if all(size[0] == size[1] for size in sizes):
        return None
    offset = _DIR_OFFSET.search(text)
    return _OldFrame(sizes, rotations, float(offset.group(1)) if offset else 0.0)


def _match_rotations(old: Sequence[float], new: Sequence[float]) -> tuple[list[int], list[float]]:
    """For each old anchor rotation its index among the new ones, and the remaining yaw in radians."""
    indices: list[int] = []
    remainders: list[float] = []
    for rotation in old:
        converted = -rotation - math.pi / 2
        gaps = [math.remainder(converted - other, math.pi) for other in new]
        index = min(range(len(gaps)), key=lambda k: abs(gaps[k]))
        indices.append(index)
        remainders.append(gaps[index])
    if len(old) != len(new) or sorted(indices) != list(range(len(new))) or max(map(abs, remainders)) > 0.05:
        raise CheckpointError(
            f"anchor rotations {list(old)} of the checkpoint do not correspond to {list(new)} of the config"
        )
    return indices, remainders
