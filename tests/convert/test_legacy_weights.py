"""Fitting weights to models, old ones included (`serve.convert.legacy_weights`)."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from serve.convert.checkpoint import Checkpoint, load_checkpoint
from serve.convert.legacy_weights import (
    KeyReport,
    adapt_and_load,
    adapt_state_dict,
    compare_keys,
    convert_anchor_head,
    shapes_of,
    versions_of,
)
from serve.errors import CheckpointError


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def checkpoint_of(weights: dict[str, torch.Tensor], **meta: Any) -> Checkpoint:
    return Checkpoint(weights, meta, {})


def test_missing_unexpected_and_misshapen_keys_stop_the_load() -> None:
    weights = dict(small_net().state_dict())
    weights["extra.weight"] = torch.zeros(1)
    weights["0.weight"] = torch.zeros(5, 3, 3, 3)
    del weights["1.bias"], weights["1.num_batches_tracked"]
    with pytest.raises(CheckpointError) as caught:
        adapt_and_load(small_net(), checkpoint_of(weights))
    text = str(caught.value)
    assert "--allow-partial" in text
    for part in (
        "1 missing:\n    1.bias",
        "1 unexpected:\n    extra.weight",
        "1 misshapen:\n    0.weight",
    ):
        assert part in text
    net = small_net()
    report = adapt_and_load(net, checkpoint_of(weights), allow_partial=True)
    assert (report.missing, report.unexpected, report.ok) == (("1.bias",), ("extra.weight",), False)
    assert [key for key, _ in report.misshapen] == ["0.weight"]
    plain = compare_keys(weights, shapes_of(net))
    assert (plain.missing, plain.unexpected) == (report.missing, report.unexpected)
    assert plain.misshapen[0][0] == "0.weight"


def test_long_key_list_is_shortened_with_its_count() -> None:
    report = KeyReport(missing=tuple(f"layer{index}.weight" for index in range(100)))
    assert "100 missing" in report.summary()
    assert report.summary(limit=5).endswith("… and 95 more")
    assert KeyReport().ok and "\n" not in KeyReport().summary()


class Renaming(nn.Module):
    """Renames a former key when its version is unknown, as FCOS, VFNet and FCAF3D do."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.bbox_head = nn.Linear(2, 2)

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, local: dict[str, Any], *rest: Any
    ) -> None:
        if local.get("version") is None:
            for key in list(state):
                if "head." in key:
                    state[key.replace("head.", "bbox_head.")] = state.pop(key)
        super()._load_from_state_dict(state, prefix, local, *rest)


def test_modules_rename_only_their_former_keys(tmp_path: Path) -> None:
    model = Renaming()
    former = {key.replace("bbox_head", "head"): value for key, value in model.state_dict().items()}
    assert adapt_and_load(Renaming(), checkpoint_of(dict(former))).ok
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    assert adapt_and_load(Renaming(), load_checkpoint(tmp_path / "a.pth")).ok
    bare = checkpoint_of(dict(model.state_dict()))
    with pytest.raises(CheckpointError):  # renamed twice: why versions must travel with the weights
        adapt_and_load(Renaming(), bare)
    assert adapt_and_load(Renaming(), bare, versions=versions_of(model)).ok


def test_adapt_and_load_equals_torch_on_ordinary_modules() -> None:
    source, target = small_net(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    adapt_and_load(target, checkpoint_of(dict(source.state_dict())))
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    assert all(parameter.requires_grad for parameter in target.parameters())


SIDES = st.integers(1, 4)


@given(kernel=st.tuples(SIDES, SIDES, SIDES), into=st.integers(1, 6), out=st.integers(1, 6))
def test_sparse_kernels_are_permuted_to_the_layout_of_the_model(
    kernel: tuple[int, int, int], into: int, out: int
) -> None:
    mmcv = torch.arange(math.prod(kernel) * into * out).reshape(*kernel, into, out)
    spconv2 = torch.einsum("xyzio->oxyzi", mmcv)
    for have, want in ((mmcv, spconv2), (spconv2, mmcv), (mmcv, mmcv), (spconv2, spconv2)):
        # A second, unambiguous kernel of the same part tells the direction where this one cannot.
        other = torch.zeros(3, 3, 3, 16, 32)
        other_have = other if have is mmcv else other.permute(4, 0, 1, 2, 3)
        other_want = other if want is mmcv else other.permute(4, 0, 1, 2, 3)
        shapes = {"enc.a.weight": tuple(want.shape), "enc.b.weight": tuple(other_want.shape)}
        adapted, notes = adapt_state_dict({"enc.a.weight": have, "enc.b.weight": other_have}, shapes)
        assert torch.equal(adapted["enc.a.weight"], want)
        assert tuple(adapted["enc.b.weight"].shape) == shapes["enc.b.weight"]
        assert bool(notes) == (have is not want)


def test_ambiguous_kernel_stays_unchanged_without_other_kernels() -> None:
    kernel = torch.rand(3, 3, 3, 3, 3)
    adapted, notes = adapt_state_dict({"a.weight": kernel}, {"a.weight": (3, 3, 3, 3, 3)})
    assert adapted["a.weight"] is kernel
    assert notes == ()


def test_dense_3d_kernels_stay_unchanged() -> None:
    model = nn.Conv3d(4, 8, 3)
    adapted, notes = adapt_state_dict(model.state_dict(), shapes_of(model))
    assert notes == ()
    assert torch.equal(adapted["weight"], model.weight)


class Spconv2(nn.Module):
    """Loads as mmdet3d makes spconv 2's modules load: permutes whatever is not of version 2."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 3, 3, 3, 16))

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, local: dict[str, Any], *rest: Any
    ) -> None:
        if local.get("version") != 2:
            state[prefix + "weight"] = state[prefix + "weight"].permute(4, 0, 1, 2, 3)
        super()._load_from_state_dict(state, prefix, local, *rest)


def test_permuted_kernel_is_not_permuted_again_by_its_module() -> None:
    model = nn.ModuleDict({"conv": Spconv2()})
    old = torch.rand(3, 3, 3, 16, 32)
    report = adapt_and_load(model, checkpoint_of({"conv.weight": old}))
    assert torch.equal(model["conv"].weight.detach(), old.permute(4, 0, 1, 2, 3))
    assert "spconv 2" in report.notes[0]


def test_mmdet_1_weights_are_rejected_with_the_upgrade_script() -> None:
    with pytest.raises(CheckpointError, match="upgrade_model_version"):
        adapt_and_load(small_net(), checkpoint_of(dict(small_net().state_dict()), mmdet_version="1.2.0+abc"))


# --- the box frame before mmdetection3d 1.0.0rc0 ----------------------------------------------------------

OLD_SIZES = [[0.6, 0.8, 1.73], [0.6, 1.76, 1.73], [1.6, 3.9, 1.56]]
ROTATIONS = [0, 1.57]
OLD_CONFIG = f"""
model = dict(type='VoxelNet', bbox_head=dict(type='Anchor3DHead', num_classes=3,
    anchor_generator=dict(type='Anchor3DRangeGenerator',
        sizes={OLD_SIZES},
        rotations={ROTATIONS}, reshape_out=False)))
"""


def decoded_then(deltas: np.ndarray[Any, Any], bins: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Boxes (x, y, z, l, w, h, yaw of today) of the 6 anchors of a cell, as mmdetection3d 0.x did it."""
    boxes = []
    for index, (delta, half) in enumerate(zip(deltas, bins, strict=True)):
        width, length, height = OLD_SIZES[index // 2]
        diagonal = math.hypot(width, length)
        yaw = (delta[6] + ROTATIONS[index % 2]) % math.pi + math.pi * half  # bin 0 is [0, pi)
        new_height = height * math.exp(delta[5])
        boxes.append(
            [
                *(delta[0] * diagonal, delta[1] * diagonal),
                delta[2] * height + height / 2 - new_height / 2,
                *(length * math.exp(delta[4]), width * math.exp(delta[3]), new_height),
                -yaw - math.pi / 2,
            ]
        )
    return np.array(boxes)


@pytest.fixture(scope="module")
def second() -> nn.Module:
    """The real SECOND of the installed mmdet3d, on our own kernels."""
    ops = pytest.importorskip("serve.ops")
    ops.install()
    import mmdet3d.models  # noqa: F401
    from mmdet3d.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    from serve import zoo

    config = Config.fromfile(zoo.resolve("second").config_path)
    with DefaultScope.overwrite_default_scope("mmdet3d"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dir_offset and dir_limit_offset")  # Anchor3DHead, of itself
        model: nn.Module = MODELS.build(config.model)
    return model.eval()


def decoded_now(head: Any, deltas: torch.Tensor, bins: torch.Tensor) -> np.ndarray[Any, Any]:
    from mmdet3d.structures import limit_period

    anchors = head.prior_generator.grid_anchors([(1, 1)], device="cpu")[0].reshape(-1, 7).clone()
    anchors[:, :3] = 0
    boxes = head.bbox_coder.decode(anchors, deltas)
    turned = limit_period(boxes[:, 6] - head.dir_offset, head.dir_limit_offset, math.pi)
    boxes[:, 6] = turned + head.dir_offset + math.pi * bins
    return np.asarray(boxes.detach().numpy())


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # mmdet3d's anchor generator
def test_converted_anchor_head_decodes_the_same_boxes(second: Any) -> None:
    head = second.bbox_head
    generator = torch.Generator().manual_seed(3)
    old = {
        name: torch.randn(value.shape, generator=generator) * 0.05
        for name, value in head.state_dict().items()
    }
    new = convert_anchor_head(
        old, "", sizes=3, old_rotations=ROTATIONS, new_rotations=head.prior_generator.rotations
    )
    for _ in range(20):
        feature = torch.randn(1, 512, 1, 1, generator=generator)
        outputs = []
        for weights in (old, new):
            head.load_state_dict(weights)
            with torch.no_grad():
                outputs.append([part[0].reshape(6, -1) for part in head.forward_single(feature)])
        (scores_then, deltas_then, halves_then), (scores_now, deltas_now, halves_now) = outputs
        then = decoded_then(deltas_then.numpy(), halves_then.argmax(1).numpy())
        now = decoded_now(head, deltas_now, halves_now.argmax(1))
        order = [1, 0, 3, 2, 5, 4]  # an anchor of 0 then is one of 1.57 now
        np.testing.assert_allclose(now[order, :6], then[:, :6], atol=1e-5)
        gap = np.remainder(now[order, 6] - then[:, 6] + math.pi, 2 * math.pi) - math.pi
        np.testing.assert_allclose(gap, 0, atol=1e-5)
        torch.testing.assert_close(scores_now[order], scores_then, atol=1e-5, rtol=1e-5)


def test_pre_1_0_second_loads_with_converted_head_and_kernels(second: Any) -> None:
    torch.manual_seed(1)
    old = {name: torch.rand_like(value, dtype=torch.float32) for name, value in second.state_dict().items()}
    saved = {name: value.permute(4, 0, 1, 2, 3) if value.dim() == 5 else value for name, value in old.items()}
    saved = {name: value for name, value in saved.items() if "num_batches" not in name}
    report = adapt_and_load(second, checkpoint_of(saved, config=OLD_CONFIG, mmdet3d_version="0.5.0"))
    assert report.ok
    assert any("12 sparse kernels" in note for note in report.notes)
    assert any("box frame" in note for note in report.notes)
    loaded = second.state_dict()
    name = "middle_encoder.encoder_layers.encoder_layer2.0.0.weight"
    assert torch.equal(loaded[name], old[name])
    assert torch.equal(loaded["bbox_head.conv_cls.weight"][:3], old["bbox_head.conv_cls.weight"][3:6])
    first = checkpoint_of(saved, config=OLD_CONFIG, mmdet_version="0.1.0")  # mmdet3d's, in June 2020
    assert adapt_and_load(second, first).ok
    assert (
        "mmdetection3d 0.16.0"
        in adapt_and_load(second, checkpoint_of(saved, mmdet3d_version="0.16.0")).notes[-1]
    )
    today = OLD_CONFIG.replace(str(OLD_SIZES), "[[0.8, 0.6, 1.73], [1.76, 0.6, 1.73], [3.9, 1.6, 1.56]]")
    assert not any(
        "converted" in note for note in adapt_and_load(second, checkpoint_of(saved, config=today)).notes
    )


@pytest.mark.parametrize(
    "config",
    [
        OLD_CONFIG.replace("rotations=", "dir_offset=0.7854, rotations="),
        OLD_CONFIG.replace("[1.6, 3.9, 1.56]", "[1.6, 4.9, 1.56]"),
    ],
    ids=["other direction bins", "other anchors"],
)
def test_unconvertible_anchor_head_is_rejected_unless_partial(second: Any, config: str) -> None:
    weights = dict(second.state_dict())
    with pytest.raises(CheckpointError, match=r"1\.0\.0rc0.*--allow-partial"):
        adapt_and_load(second, checkpoint_of(weights, config=config))
    assert adapt_and_load(second, checkpoint_of(weights, config=config), allow_partial=True).notes


def test_mismatched_rotations_and_channels_are_rejected() -> None:
    with pytest.raises(CheckpointError, match=r"1\.57"):
        convert_anchor_head({}, "", sizes=1, old_rotations=[0, 1.57], new_rotations=[0, 0.7])
    with pytest.raises(CheckpointError, match=r"conv_reg\.weight"):
        convert_anchor_head(
            {"conv_reg.weight": torch.zeros(18, 4, 1, 1)},
            "",
            sizes=1,
            old_rotations=[0, 1.57],
            new_rotations=[0, 1.57],
        )
