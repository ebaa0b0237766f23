"""Dense heads select what upstream's code selects, in its order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from serve import ops

ops.install("portable")

from serve.runtime import dense_selection  # noqa: E402
from tests.runtime.test_fused_blocks import FCOS, PROPOSALS, RETINA, RTMDET, build  # noqa: E402

# Upstream calls what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

NMS = {"type": "nms", "iou_threshold": 0.6}
DENSE = {"nms_pre": 100, "min_bbox_size": 0, "score_thr": 0.05, "nms": NMS, "max_per_img": 50}


def heads(kind: dict[str, Any], test_cfg: dict[str, Any]) -> tuple[Any, Any]:
    from mmengine.config import ConfigDict

    settings = {key: value for key, value in kind.items() if key != "type"}
    plain = build(kind["type"], **settings, test_cfg=ConfigDict(test_cfg)).eval()
    replaced = copy.deepcopy(plain)
    dense_selection.install(replaced)
    return plain, replaced


def predict(head: Any, spread: float, seed: int, *, batch: int = 2) -> list[Any]:
    """Give a head random maps in the place of its own."""
    generator = torch.Generator().manual_seed(seed)
    priors = head.num_base_priors
    strides = [stride[0] for stride in head.prior_generator.strides]
    sizes = [(-(-160 // stride), -(-256 // stride)) for stride in strides]

    def random(channels: int, scale: float) -> list[torch.Tensor]:
        return [torch.randn(batch, channels, *size, generator=generator) * scale for size in sizes]

    scores = random(priors * head.cls_out_channels, spread)
    boxes = [one.abs() for one in random(priors * 4, 8.0 if priors == 1 else 0.5)]
    factors = [random(1, 1.0)] if type(head).__name__ == "FCOSHead" else []
    metas = [{"img_shape": (160, 256), "scale_factor": (0.5, 0.5)}] * batch
    with torch.no_grad():
        found: list[Any] = head.predict_by_feat(scores, boxes, *factors, batch_img_metas=metas, rescale=True)
    return found


@pytest.fixture
def reproducible_torch(monkeypatch: Any) -> None:
    """Let torch sort stably, and round a sigmoid by the same function wherever it is."""
    sort, sigmoid = torch.Tensor.sort, torch.Tensor.sigmoid

    def in_full_vectors(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(-1)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % 64))
        return sigmoid(padded)[: len(flat)].view(tensor.shape)

    def stably(tensor: torch.Tensor, **settings: Any) -> Any:
        return sort(tensor, **{**settings, "stable": True})

    monkeypatch.setattr(torch.Tensor, "sort", stably)
    monkeypatch.setattr(torch.Tensor, "sigmoid", in_full_vectors)


@pytest.mark.usefixtures("reproducible_torch")
@pytest.mark.parametrize("head", [RETINA, FCOS, RTMDET, PROPOSALS], ids=lambda head: head["type"])
@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("limit", [7, 100, 100000])
def test_boxes_are_those_of_upstreams_selection(head, spread, limit):
    plain, replaced = heads(head, {**DENSE, "nms_pre": limit})
    assert "_predict_by_feat_single" in vars(replaced)
    for expected, got in zip(predict(plain, spread, 1), predict(replaced, spread, 1), strict=True):
        assert torch.equal(got.labels, expected.labels)
        torch.testing.assert_close(got.scores, expected.scores, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got.bboxes, expected.bboxes, atol=1e-4, rtol=1e-6)
        assert len(got) > 0


@pytest.mark.usefixtures("reproducible_torch")
@pytest.mark.parametrize("most", [3, 50, 100000])
@pytest.mark.parametrize("split_thr", [1, 10_000])
def test_suppression_by_class_keeps_what_upstreams_keeps(most, split_thr):
    plain, replaced = heads(RETINA, {**DENSE, "max_per_img": most, "nms": {**NMS, "split_thr": split_thr}})
    for expected, got in zip(predict(plain, 2.0, 4), predict(replaced, 2.0, 4), strict=True):
        assert torch.equal(got.labels, expected.labels) and torch.equal(got.bboxes, expected.bboxes)
        assert 0 < len(got) <= most


@pytest.mark.usefixtures("reproducible_torch")
def test_other_kinds_of_suppression_are_upstreams():
    plain, replaced = heads(RETINA, {**DENSE, "nms": {"type": "soft_nms", "iou_threshold": 0.3}})
    for expected, got in zip(predict(plain, 2.0, 5), predict(replaced, 2.0, 5), strict=True):
        assert torch.equal(got.scores, expected.scores) and torch.equal(got.bboxes, expected.bboxes)


@pytest.mark.usefixtures("reproducible_torch")
def test_no_limit_leaves_out_the_worst_candidate_as_upstream_does():
    plain, replaced = heads(RETINA, {**DENSE, "nms_pre": -1, "max_per_img": 100000})
    for expected, got in zip(predict(plain, 1.0, 2), predict(replaced, 1.0, 2), strict=True):
        assert torch.equal(got.labels, expected.labels) and torch.equal(got.bboxes, expected.bboxes)


def test_heads_with_a_selection_of_their_own_are_left_as_they_are():
    from mmdet.models.dense_heads import RetinaHead

    class Own(RetinaHead):
        def _predict_by_feat_single(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    head = heads(RETINA, DENSE)[0]
    head.__class__ = Own
    dense_selection.install(head)
    assert "_predict_by_feat_single" not in vars(head)
