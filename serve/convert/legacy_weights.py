"""Fit the weights of a checkpoint to a model: old layouts, old box frame, and what is left over.

What changed under OpenMMLab's names since mmdet 2 / mmdet3d 0.x, and is mended here:

* sparse 3D kernels: mmcv and spconv 1 keep (kx, ky, kz, in, out), spconv 2 keeps (out, kx, ky, kz, in);
* the LiDAR box frame before mmdetection3d 1.0.0rc0: sizes were (w, l, h), yaw was -yaw - pi/2 of today's, and
  anchors with it. The last layers of an `Anchor3DHead` are linear in that, so they can be turned exactly.

Key names of SECOND and PointPillars did not change; where other models' did (FCOS, VFNet, FCAF3D, two-stage
detectors) the modules themselves rename while loading, which `adapt_and_load` lets them do.

Does not know files (`serve.convert.checkpoint`), and does not convert mmdet 1.x (other class order) or VoteNet/H3DNet
before 0.6: upstream has scripts for those, and such checkpoints are refused with a sentence that says so.
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
    """How the keys of a checkpoint and a model met. ``num_batches_tracked`` never counts."""

    missing: tuple[str, ...] = ()
    """Weights of the model that the checkpoint lacks: they stay as initialised."""
    unexpected: tuple[str, ...] = ()
    """Weights of the checkpoint that the model has no place for."""
    misshapen: tuple[tuple[str, str], ...] = ()
    """(key, what is wrong) of weights present on both sides that do not fit."""
    notes: tuple[str, ...] = ()
    """Sentences on what was changed to make them fit."""

    @property
    def ok(self) -> bool:
        """Whether every weight found its place."""
        return not (self.missing or self.unexpected or self.misshapen)

    def summary(self, limit: int = 20) -> str:
        """List what does not fit, at most `limit` keys of each kind, one a line."""
        wrong = [f"{key} ({what})" for key, what in self.misshapen]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", wrong))
        lines: list[str] = []
        for title, keys in kinds:
            if keys:
                more = [f"    … and {len(keys) - limit} more"] if len(keys) > limit else []
                lines += [f"{len(keys)} {title}:", *(f"    {key}" for key in keys[:limit]), *more]
        return "\n".join(lines) or "every weight fits"


def shapes_of(model: torch.nn.Module) -> dict[str, Shape]:
    """Give the shape of everything in the model's state dict."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}


def versions_of(model: torch.nn.Module) -> dict[str, int]:
    """Give module path → version, as torch records it with weights saved now.

    To be kept with weights that leave torch's own format (safetensors): modules that renamed their keys once
    rename again, wrongly, when they see no version.
    """
    metadata: Mapping[str, Mapping[str, Any]] = getattr(model.state_dict(), "_metadata", {})
    pairs = ((name, entry.get("version")) for name, entry in metadata.items())
    return {name: version for name, version in pairs if isinstance(version, int)}


def compare_keys(state_dict: Mapping[str, torch.Tensor], expected_shapes: Mapping[str, Shape]) -> KeyReport:
    """Compare names and shapes as they stand, without the renaming that modules do while loading."""
    have = {name: tuple(value.shape) for name, value in state_dict.items()}
    wrong = [
        (name, f"{have[name]} in the checkpoint, {tuple(shape)} in the model")
        for name, shape in expected_shapes.items()
        if name in have and have[name] != tuple(shape)
    ]
    return KeyReport(
        _counting(name for name in expected_shapes if name not in have),
        _counting(name for name in have if name not in expected_shapes),
        tuple(wrong),
    )


def adapt_state_dict(
    state_dict: Mapping[str, torch.Tensor], expected_shapes: Mapping[str, Shape]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Bring sparse 3D kernels into the layout the model wants.

    A 5-dimensional weight is permuted when its shape is wrong and exactly right afterwards. Only a kernel
    whose five sizes are all equal has a shape that says nothing; it follows the other kernels of its part of
    the model (first word of the key), and stays as it is when there are none.

    Args:
        state_dict: name → weight; not changed, weights that stay are shared.
        expected_shapes: name → shape in the model (see `shapes_of`).

    Returns:
        The weights, and sentences on what was done.
    """
    turns: dict[str, tuple[int, ...]] = {}
    silent: list[str] = []
    for name, shape in expected_shapes.items():
        weight = state_dict.get(name)
        if weight is None or weight.dim() != 5 or len(shape) != 5:
            continue
        if tuple(weight.shape) == tuple(shape):
            if len(set(shape)) == 1 and shape[0] > 1:
                silent.append(name)
            continue
        for order in (_TO_SPCONV2, _TO_MMCV):
            if tuple(weight.shape[axis] for axis in order) == tuple(shape):
                turns[name] = order
    parts: dict[str, set[tuple[int, ...]]] = {}
    for name, order in turns.items():
        parts.setdefault(name.split(".")[0], set()).add(order)
    for name in silent:
        seen = parts.get(name.split(".")[0], set())
        if len(seen) == 1:
            turns[name] = next(iter(seen))

    adapted = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        adapted._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for name, order in turns.items():
        adapted[name] = state_dict[name].permute(order).contiguous()
    notes = []
    layouts = {_TO_SPCONV2: "spconv 2's (out, k, k, k, in)", _TO_MMCV: "mmcv's (k, k, k, in, out)"}
    for order, layout in layouts.items():
        if count := sum(turn == order for turn in turns.values()):
            notes.append(f"{count} sparse kernels were brought into {layout} layout")
    return adapted, tuple(notes)


def convert_anchor_head(
    state_dict: Mapping[str, torch.Tensor],
    prefix: str,
    *,
    sizes: int,
    old_rotations: Sequence[float],
    new_rotations: Sequence[float],
) -> dict[str, torch.Tensor]:
    """Turn the last layers of an `Anchor3DHead` from the frame before mmdetection3d 1.0.0rc0 into today's.

    Then a box was (x, y, z, w, l, h, yaw'), now it is (x, y, z, l, w, h, yaw) with yaw = -yaw' - pi/2
    (upstream's ``update_data_coords.py``). So an anchor of rotation r' is today's anchor of rotation
    -r' - pi/2 (mod pi); the regression of w and l changes places; that of yaw changes its sign, plus what the
    two anchors' rotations (1.57, not pi/2) leave over; and the two halves of the circle change places,
    because the direction bins began at 0 and begin at -pi/2 now.

    Args:
        state_dict: not changed.
        prefix: of the head, with the dot: ``bbox_head.``.
        sizes: number of anchor sizes; rotations vary faster than sizes.
        old_rotations: of the anchors then, radians.
        new_rotations: of the anchors now, radians, as many.

    Raises:
        CheckpointError: the rotations then and now are not the same set of directions, or the layers are not
            those of such a head (7 numbers a box, 2 direction bins).
    """
    to_new, rest = _matching_rotations(old_rotations, new_rotations)
    count = sizes * len(to_new)
    turned = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        turned._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for layer in ("conv_cls", "conv_reg", "conv_dir_cls"):
        for kind in ("weight", "bias"):
            name = f"{prefix}{layer}.{kind}"
            if name not in state_dict:
                continue
            old = state_dict[name]
            per_anchor = old.shape[0] // count
            fits = per_anchor * count == old.shape[0]
            if not fits or {"conv_reg": _BOX, "conv_dir_cls": 2}.get(layer, per_anchor) != per_anchor:
                raise CheckpointError(f"{name} has {old.shape[0]} channels, wrong for {count} anchors.")
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
                        new[:, after, 6] += rest[before]
            turned[name] = new.reshape(old.shape)
    return turned


def adapt_and_load(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    *,
    versions: Mapping[str, int] | None = None,
    allow_partial: bool = False,
) -> KeyReport:
    """Put the checkpoint's weights into the model, adapting what is known to have changed.

    Modules rename their own former keys on the way, as with mmengine's loader; unlike it, nothing that does
    not fit passes in silence.

    Args:
        model: on any device; changed in place.
        checkpoint: from `serve.convert.checkpoint.load_checkpoint`.
        versions: module versions to go by instead of the checkpoint's own; give `versions_of` the same class
            of model for weights that were saved from it outside torch's format.
        allow_partial: go on with what fits.

    Raises:
        CheckpointError: something is missing, left over or misshapen (all listed), or the weights are of an
            age that cannot be converted; not with `allow_partial`.
    """
    weights, notes = adapt_state_dict(checkpoint.state_dict, shapes_of(model))
    weights, aged = _mended(model, weights, checkpoint.meta, allow_partial=allow_partial)
    own = versions_of(model)
    known = dict(checkpoint.versions if versions is None else versions)
    for name, value in weights.items():
        # spconv's modules permute by version alone; these weights have the right layout already.
        owner = name.rpartition(".")[0]
        if value.dim() == 5 and owner in own:
            known[owner] = own[owner]
    missing, unexpected, errors = _load(model, weights, known)
    report = KeyReport(
        _counting(missing),
        _counting(unexpected),
        tuple(_misshapen(error) for error in errors),
        (*checkpoint.notes, *notes, *aged),
    )
    if not report.ok and not allow_partial:
        first = "the checkpoint does not fit the config (--allow-partial goes on with what fits):"
        raise CheckpointError(f"{first}\n{report.summary()}")
    return report


# --- what adapt_and_load is made of -------------------------------------------------------------------------


def _counting(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if "num_batches_tracked" not in name))


def _misshapen(error: str) -> tuple[str, str]:
    """Take the key out of what a module says when a weight does not fit."""
    found = _SIZE_MISMATCH.search(error)
    what = " ".join(error.split())
    return (found.group(1), what[found.end() :].strip().rstrip(".")) if found else ("?", what)


def _load(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], versions: Mapping[str, int]
) -> tuple[list[str], list[str], list[str]]:
    """Walk the modules as torch's load_state_dict does, but collect instead of raising."""
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


def _mended(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], meta: Mapping[str, Any], *, allow_partial: bool
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Turn weights of the old box frame, and refuse ages that cannot be mended."""
    trouble = ""
    # The first mmdet3d wrote its own version under mmdet's name.
    in_3d = type(model).__module__.startswith("mmdet3d.")
    version = str(meta.get("mmdet3d_version") or meta.get("mmdet_version") or "")
    if not in_3d and version.startswith(("0.", "1.")):
        trouble = (
            f"the checkpoint is of mmdetection {version}, which counted classes from the "
            "background: upgrade it with mmdet's tools/model_converters/upgrade_model_version.py first"
        )
    elif (frame := _old_frame(meta)) is not None:
        generator = getattr(getattr(model, "bbox_head", None), "prior_generator", None)
        now = [[float(part) for part in size] for size in getattr(generator, "sizes", ())]
        if now == frame.sizes:
            return weights, (f"the config keeps the anchors of {_OLD_FRAME}",)
        if frame.turns_into(model, now):
            turned = convert_anchor_head(
                weights,
                "bbox_head.",
                sizes=len(frame.sizes),
                old_rotations=frame.rotations,
                new_rotations=[float(rotation) for rotation in getattr(generator, "rotations", ())],
            )
            return turned, (f"the head was turned from {_OLD_FRAME} into today's",)
        trouble = (
            f"the checkpoint was trained in {_OLD_FRAME}, and this model's head cannot be turned into "
            "today's: boxes would come out with width and length exchanged; use weights of 1.0.0 or later"
        )
    elif in_3d and version.startswith("0."):
        note = f"the checkpoint says mmdetection3d {version}: its boxes may be in {_OLD_FRAME}"
        return weights, () if "Anchor3D" in str(meta.get("config")) else (note,)
    if trouble and not allow_partial:
        raise CheckpointError(f"{trouble} (--allow-partial goes on nevertheless).")
    return weights, (trouble,) if trouble else ()


@dataclass(frozen=True)
class _OldFrame:
    """Anchors of a config from before the box frame changed."""

    sizes: list[list[float]]
    rotations: list[float]
    dir_offset: float

    def turns_into(self, model: torch.nn.Module, sizes: list[list[float]]) -> bool:
        """Whether the model is one whose head `convert_anchor_head` understands, with the same anchors."""
        head = getattr(model, "bbox_head", None)
        names = (type(model).__name__, type(head).__name__)
        known = names in (("VoxelNet", "Anchor3DHead"), ("DynamicVoxelNet", "Anchor3DHead"))
        bins = self.dir_offset == 0.0 and abs(float(getattr(head, "dir_offset", 0.0)) + math.pi / 2) < 1e-3
        return known and bins and sizes == [[length, width, height] for width, length, height in self.sizes]


def _old_frame(meta: Mapping[str, Any]) -> _OldFrame | None:
    """Give the anchors when the recorded config is of the old box frame.

    Told by its anchors, not by its version: every one is narrower along x than along y, or none.
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


def _matching_rotations(old: Sequence[float], new: Sequence[float]) -> tuple[list[int], list[float]]:
    """Give for each old anchor rotation its place among the new ones, and the yaw left between them."""
    places: list[int] = []
    rests: list[float] = []
    for rotation in old:
        here = -rotation - math.pi / 2
        gaps = [math.remainder(here - other, math.pi) for other in new]
        place = min(range(len(gaps)), key=lambda index: abs(gaps[index]))
        places.append(place)
        rests.append(gaps[place])
    if len(old) != len(new) or sorted(places) != list(range(len(new))) or max(map(abs, rests)) > 0.05:
        raise CheckpointError(f"anchor rotations {list(old)} then and {list(new)} now do not go together.")
    return places, rests
