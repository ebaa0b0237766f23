"""Networks that skip background give the bits of networks that compute everything."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from serve import ops

ops.install("portable")

from serve.compare.detections import compare  # noqa: E402
from serve.runtime import background, background_model, fusion, masked  # noqa: E402
from serve.runtime.model import suppress_warnings  # noqa: E402

with suppress_warnings():
    from mmdet3d.structures import LiDARInstance3DBoxes

    from serve.runtime import center_head as center_head_module
from tests.runtime.test_fusion import prepare  # noqa: E402

CHANNELS, HEIGHT, WIDTH = 32, 36, 44


class Detector(nn.Module):
    """The dense part of a LiDAR detector under mmdet3d's names."""

    def __init__(self, head: dict[str, Any], neck: str = "SECONDFPN") -> None:
        super().__init__()
        from mmdet3d.registry import MODELS

        self.middle_encoder = MODELS.build(
            {"type": "PointPillarsScatter", "in_channels": CHANNELS, "output_shape": (HEIGHT, WIDTH)}
        )
        scales, norm = [32, 64], {"type": "BN", "eps": 1e-3, "momentum": 0.01}
        self.backbone = MODELS.build(
            {"type": "SECOND", "in_channels": CHANNELS, "out_channels": scales, "layer_nums": [2, 1],
             "layer_strides": [1, 2], "norm_cfg": norm}
        )  # fmt: skip
        necks = {
            "SECONDFPN": {
                "out_channels": [32, 32],
                "upsample_strides": [1, 2],
                "use_conv_for_no_stride": True,
            },
            "mmdet.FPN": {"out_channels": 64, "num_outs": 2, "act_cfg": {"type": "ReLU"}},
        }
        self.neck = MODELS.build({"type": neck, "in_channels": scales, "norm_cfg": norm, **necks[neck]})
        with suppress_warnings():
            self.bbox_head = MODELS.build(head)

    def forward(self, canvas: Tensor) -> list[Tensor]:
        found = self.bbox_head(self.neck(self.backbone(canvas)))
        return [tensor for tensor in flatten(found)]


def flatten(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = [found[key] for key in sorted(found)]
    return [tensor for one in found for tensor in flatten(one)]


def anchor_head() -> dict[str, Any]:
    return {
        "type": "Anchor3DHead", "num_classes": 2, "in_channels": 64, "feat_channels": 64,
        "use_direction_classifier": True,
        "anchor_generator": {"type": "Anchor3DRangeGenerator", "ranges": [[0, -4, -1, 8, 4, -1]] * 2,
                             "sizes": [[1, 1, 1], [2, 1, 1]], "rotations": [0, 1.57], "reshape_out": False},
        "bbox_coder": {"type": "DeltaXYZWLHRBBoxCoder"},
        "loss_cls": {"type": "mmdet.FocalLoss", "use_sigmoid": True, "loss_weight": 1.0},
        "loss_bbox": {"type": "mmdet.SmoothL1Loss", "loss_weight": 2.0},
        "loss_dir": {"type": "mmdet.CrossEntropyLoss", "loss_weight": 0.2},
    }  # fmt: skip


def center_head() -> dict[str, Any]:
    return {
        "type": "CenterHead", "in_channels": 64, "share_conv_channel": 32,
        "tasks": [{"num_class": 1, "class_names": ["car"]}, {"num_class": 5, "class_names": list("abcde")}],
        "common_heads": {"reg": (2, 2), "height": (1, 2), "dim": (3, 2), "rot": (2, 2)},
        "bbox_coder": {"type": "CenterPointBBoxCoder", "pc_range": [0, 0], "voxel_size": [1, 1], "out_size_factor": 1},
        "separate_head": {"type": "SeparateHead", "init_bias": -2.19, "final_kernel": 3},
        "loss_cls": {"type": "mmdet.GaussianFocalLoss", "reduction": "mean"},
        "loss_bbox": {"type": "mmdet.L1Loss", "reduction": "mean", "loss_weight": 0.25},
    }  # fmt: skip


def build(head: dict[str, Any], neck: str = "SECONDFPN") -> tuple[Detector, Detector]:
    """Return a detector as mmdet3d has it, and one that skips background."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope("mmdet3d"):
            plain = Detector(head, neck)
        for module in plain.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.bias)
    prepare(plain, 0)
    fused = copy.deepcopy(plain)
    fusion.fuse(fused, fusion.find_fusable(plain, lambda: plain(canvas(0, 0.1))))
    assert isinstance(fused.background, background_model.BackgroundModel)
    return plain, fused


def canvas(seed: int, share: float, batch: int = 1, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Tensor:
    """Return a map of which `share` holds something, in clusters."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((batch, 1, -(-size[0] // 3), -(-size[1] // 3))) < share
    mask = coarse.repeat(3, 2).repeat(3, 3)[:, :, : size[0], : size[1]]
    values = rng.standard_normal((batch, CHANNELS, *size)).astype(np.float32)
    return torch.from_numpy(values * mask).to(memory_format=torch.channels_last)


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.contiguous().numpy().tobytes() for tensor in tensors]


def run_both(network: Detector, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Run with skipping, and without."""
    with torch.no_grad():
        background.set_skipping(network, enabled=True)
        skipped = network(x)
        background.set_skipping(network, enabled=False)
        full = network(x)
        background.set_skipping(network, enabled=True)
    return skipped, full


@pytest.mark.parametrize("inside", ["written", "unwritten"])
@pytest.mark.parametrize(
    ("head", "neck"),
    [(anchor_head(), "SECONDFPN"), (center_head(), "SECONDFPN"), (anchor_head(), "mmdet.FPN")],
    ids=["anchors", "centers", "pyramid"],
)
def test_skipping_keeps_every_bit_from_an_empty_cloud_to_a_full_one(head, neck, inside, monkeypatch):
    monkeypatch.setattr(background, "_passes_maps_on", lambda network: inside == "unwritten")
    plain, fused = build(head, neck)
    assert fused.neck.writes_background == (inside == "written")
    for seed in range(50):
        x = canvas(seed, share=(seed / 49) ** 3, batch=1 + seed % 3)
        skipped, full = run_both(fused, x)
        assert bits(skipped) == bits(full), f"cloud {seed}"
        if seed % 10 == 0:
            with torch.no_grad():
                for ours, theirs in zip(full, plain(x), strict=True):
                    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:To copy construct")  # upstream's coder
@pytest.mark.parametrize("threshold", [None, 0.3, 0.9999])
@pytest.mark.parametrize("kind", ["circle", "rotate"])
def test_boxes_at_the_best_places_are_those_of_upstreams_head(kind, threshold):
    plain, _ = build(center_head())
    with torch.no_grad():  # without scores that round to 1, which tie
        for task in plain.bbox_head.task_heads:
            task.heatmap[-1].weight *= 0.1
            task.heatmap[-1].bias.normal_()
    fused = copy.deepcopy(plain)
    fusion.fuse(fused, fusion.find_fusable(plain, lambda: plain(canvas(0, 0.1))))
    config = {
        "nms_type": kind, "min_radius": [1, 2], "post_max_size": 20, "pre_max_size": 100, "nms_thr": 0.2,
        "score_threshold": 0.1, "post_center_limit_range": [-99] * 3 + [99] * 3,
    }  # fmt: skip
    for network in (plain, fused):
        head = network.bbox_head
        head.test_cfg = config
        coder = head.bbox_coder
        coder.max_num, coder.score_threshold, coder.code_size = 60, threshold, 7
        coder.post_center_range = [-99] * 3 + [99] * 3
    assert isinstance(fused.bbox_head, center_head_module.SelectiveCenterHead)
    samples = [SimpleNamespace(metainfo={"box_type_3d": LiDARInstance3DBoxes}) for _ in range(3)]
    for seed in range(3):
        # A cloud without background beside two with: cells of the background tie.
        x = torch.cat((canvas(seed, 1.0), canvas(seed, 0.1, batch=2)))
        with torch.no_grad():
            expected = plain.bbox_head.predict(plain.neck(plain.backbone(x)), samples)
            results = []
            for enabled in (True, False):
                background.set_skipping(fused, enabled=enabled)
                maps = fused.neck(fused.backbone(x))
                results.append(fused.bbox_head.predict(maps, samples))
            alone = fused.bbox_head.predict([maps[0][1:2]], samples[:1])
        for got, full in zip(*results, strict=True):
            assert torch.equal(got.bboxes_3d.tensor, full.bboxes_3d.tensor)
            assert torch.equal(got.scores_3d, full.scores_3d) and torch.equal(got.labels_3d, full.labels_3d)
        found = compare(listed(expected[0]), listed(results[0][0]))
        assert found.ok, found
        assert (found.actual_count > 0) == (threshold != 0.9999)
        assert torch.equal(alone[0].bboxes_3d.tensor, results[0][1].bboxes_3d.tensor)


def listed(found: Any) -> dict[str, Any]:
    return {
        "bboxes_3d": found.bboxes_3d.tensor.tolist(),
        "scores_3d": found.scores_3d.tolist(),
        "labels_3d": found.labels_3d.tolist(),
        "box_type_3d": "LiDAR",
    }


def test_frame_has_the_same_bits_in_any_batch_and_with_any_number_of_threads():
    _, fused = build(anchor_head())
    x = canvas(3, 0.1, batch=4)
    before = torch.get_num_threads()
    with torch.no_grad():
        together = fused(x)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for k in range(4):
                    alone = fused(x[k : k + 1].clone(memory_format=torch.channels_last))
                    assert bits(alone) == bits([tensor[k : k + 1] for tensor in together])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("neck", ["SECONDFPN", "mmdet.FPN"])
def test_one_point_leaves_most_cells_uncomputed(neck):
    _, fused = build(anchor_head(), neck)
    x = torch.zeros(1, CHANNELS, HEIGHT, WIDTH)
    x[0, :, 20, 20] = 1
    with torch.no_grad():
        fused(x)
        merged, *_ = fused.neck(fused.backbone(x))
    assert 0 < merged.changes.mask.mean() < 0.2


def test_modified_map_between_two_parts_is_compared_again():
    _, fused = build(anchor_head())
    x = canvas(1, 0.05)

    def run() -> list[Tensor]:
        (merged,) = fused.neck(fused.backbone(x))
        merged[:, :, 0, 0] += 1.0
        return flatten(fused.bbox_head([merged]))

    with torch.no_grad():
        skipped = run()
        background.set_skipping(fused, enabled=False)
        assert bits(skipped) == bits(run())


def test_unwritten_background_is_written_for_a_part_that_does_not_know_it(monkeypatch):
    monkeypatch.setattr(background, "_passes_maps_on", lambda network: True)
    _, fused = build(anchor_head())
    x = canvas(1, 0.05)
    with torch.no_grad():
        fused(x)
        skipped = fused.neck(fused.backbone(x))
        known = fused.bbox_head.conv_cls.backgrounds
        for size, (before, after) in known.items():
            known[size] = [copy.deepcopy(before), after]
        with pytest.raises(RuntimeError):
            skipped[0][:, :, 0, 0] += 1.0
            fused.bbox_head(skipped)
        found = flatten(fused.bbox_head(fused.neck(fused.backbone(x))))
        background.set_skipping(fused, enabled=False)
        assert bits(found) == bits(flatten(fused.bbox_head(fused.neck(fused.backbone(x)))))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_unusual_values_keep_their_bits(value):
    _, fused = build(anchor_head())
    x = canvas(2, 0.05)
    x[0, 5, 7, 7] = value
    skipped, full = run_both(fused, x)
    assert bits(skipped) == bits(full)


def test_other_sizes_of_map_are_recorded_and_beyond_a_few_computed_in_full():
    _, fused = build(anchor_head())
    sizes = [(HEIGHT + 2 * k, WIDTH) for k in range(background_model.MAX_SIZES + 2)]
    for size in sizes:
        skipped, full = run_both(fused, canvas(4, 0.1, size=size))
        assert bits(skipped) == bits(full)
    assert len(fused.backbone.blocks[0].backgrounds) == background_model.MAX_SIZES


def test_scatter_equals_mmdet3ds_in_another_memory_layout():
    plain, fused = build(anchor_head())
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(2 * HEIGHT * WIDTH, generator=generator)[:300]
    coors = torch.stack([places // (HEIGHT * WIDTH), places * 0, places // WIDTH % HEIGHT, places % WIDTH], 1)
    features = torch.randn(300, CHANNELS, generator=generator)
    got = fused.middle_encoder(features, coors, 2)
    assert torch.equal(got, plain.middle_encoder(features, coors, 2))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_network_with_unfused_norms_is_left_as_it_is():
    plain, _ = build(anchor_head())
    assert background.install(plain) is None
    assert not any(isinstance(module, masked.MaskedSequence) for module in plain.modules())


def test_scales_of_different_sizes_are_an_error_that_names_them():
    _, fused = build(anchor_head())
    with pytest.raises(ValueError, match="different sizes"):
        fused.neck([torch.zeros(1, 32, 8, 8), torch.zeros(1, 64, 8, 8)])
