"""Replaced parts of two-stage image detectors against upstream's, on small random inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serve import ops

ops.install("portable")

from mmdet.models.dense_heads import RPNHead  # noqa: E402
from mmdet.models.roi_heads.bbox_heads import BBoxHead  # noqa: E402
from mmdet.models.roi_heads.mask_heads import FCNMaskHead  # noqa: E402
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from serve.runtime.accelerator import images  # noqa: E402

META = {"img_shape": (96, 128), "ori_shape": (48, 64), "scale_factor": (2.0, 2.0)}
NMS = {"type": "nms", "iou_threshold": 0.5}


@pytest.fixture(autouse=True)
def scope() -> Iterator[None]:
    """Build heads of mmdet whatever scope a fixture of the session has left."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 70
    return torch.cat((corner, corner + 4 + torch.rand(count, 2, generator=generator) * 40), dim=1)


def same(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for name in ("bboxes", "scores", "labels"):
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("limit", [images.MAX_CANDIDATES, 7])
def test_boxes_are_those_of_upstream_also_with_more_candidates_than_are_fetched(limit, monkeypatch):
    monkeypatch.setattr(images, "MAX_CANDIDATES", limit)
    torch.manual_seed(0)
    head = BBoxHead(num_classes=5, in_channels=4).eval()
    rois = [torch.cat((torch.full((n, 1), float(i)), boxes(n, i)), dim=1) for i, n in enumerate((30, 17))]
    scores = [torch.randn(len(roi), 6) * 2 for roi in rois]
    deltas = [torch.randn(len(roi), 20) * 0.3 for roi in rois]
    config = ConfigDict(score_thr=0.1, nms=NMS, max_per_img=20)
    expected = head.predict_by_feat(rois, scores, deltas, [META] * 2, config, True)
    got = images._Boxes(head)(rois, scores, deltas, [META] * 2, config, True)
    for one, other in zip(got, expected, strict=True):
        assert len(one) > 3
        same(one, other)


def test_proposals_are_those_of_upstream_without_boxes_of_no_extent():
    torch.manual_seed(0)
    config = ConfigDict(
        nms_pre=60, max_per_img=40, nms={"type": "nms", "iou_threshold": 0.7}, min_bbox_size=6
    )
    generator = {"type": "AnchorGenerator", "scales": [2], "ratios": [0.5, 1.0, 2.0], "strides": [8, 16]}
    head = RPNHead(in_channels=4, num_classes=1, anchor_generator=generator, test_cfg=config).eval()
    maps = [(12, 16), (6, 8)]
    scores = [torch.randn(2, 3, *size) for size in maps]
    deltas = [torch.randn(2, 12, *size) * 0.5 for size in maps]
    with torch.no_grad():
        expected = head.predict_by_feat(scores, deltas, batch_img_metas=[META] * 2)
        got = images._Proposals(head, on_processor=True)(scores, deltas, batch_img_metas=[META] * 2)
    for one, other in zip(got, expected, strict=True):
        same(one, other)


def test_regions_of_all_levels_are_pooled_as_upstream_pools_level_by_level():
    torch.manual_seed(0)
    extractor = SingleRoIExtractor(
        {"type": "RoIAlign", "output_size": 5, "sampling_ratio": 0}, 6, [4, 8], finest_scale=10
    )
    maps = [torch.randn(2, 6, 24, 32), torch.randn(2, 6, 12, 16)]
    rois = torch.cat(((torch.arange(25) % 2)[:, None].float(), boxes(25, 3)), dim=1)
    assert len(extractor.map_roi_levels(rois, 2).unique()) == 2
    with torch.no_grad():
        torch.testing.assert_close(
            images._Regions(extractor)(maps, rois), extractor(maps, rois), atol=1e-5, rtol=1e-5
        )


def test_masks_are_pasted_as_upstream_pastes_them_one_by_one():
    torch.manual_seed(0)
    head = FCNMaskHead(num_convs=1, in_channels=4, conv_out_channels=4, num_classes=3).eval()
    logits = torch.nn.functional.interpolate(torch.randn(9, 3, 7, 7), size=(28, 28), mode="bilinear") * 4
    found = []
    for predict in (head.predict_by_feat, images._Masks(head)):
        results = InstanceData(bboxes=boxes(9, 5), scores=torch.rand(9), labels=torch.arange(9) % 3)
        results.bboxes[4, 2] = results.bboxes[4, 0]  # without extent
        config = ConfigDict(mask_thr_binary=0.5)
        found.append(predict([logits], [results], [META], config, rescale=True)[0])
    assert torch.equal(found[0].bboxes, found[1].bboxes)
    assert found[1].masks.shape == (9, 48, 64) and found[1].masks.dtype == torch.bool
    assert torch.equal(found[0].masks, found[1].masks) and found[1].masks.any(dim=(1, 2)).sum() >= 7


def test_candidates_of_a_single_stage_head_are_suppressed_in_the_processors_memory():
    from mmdet.structures.bbox import HorizontalBoxes

    from serve.runtime.accelerator.single_stage import _PostProcess
    from serve.runtime.accelerator.stand_in import DEVICE, stand_in_device

    seen = []

    def process(results, *args, **named):
        seen.append((results, args, named))
        return results

    with stand_in_device() as device:
        results = InstanceData(metainfo={"kept": 3})
        results.bboxes = HorizontalBoxes(boxes(6, 1).to(DEVICE))
        results.scores, results.labels = torch.rand(6).to(DEVICE), torch.arange(6).to(DEVICE)
        device.reset()
        found = _PostProcess(process)(results, "config", rescale=True)
        assert device.counts.synchronisation_count == 1
        assert found.bboxes.tensor.device.type == found.scores.device.type == "cpu" and found.kept == 3
        assert torch.equal(found.bboxes.tensor, boxes(6, 1)) and found.labels.tolist() == list(range(6))
        assert seen[0][1:] == (("config",), {"rescale": True})
        results.kernels = torch.rand(6, 2).to(DEVICE)  # masks need them on the device
        assert _PostProcess(process)(results) is results
