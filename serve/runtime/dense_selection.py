"""Selection of boxes in dense 2D heads on a CPU, by the best logits instead of a sort of all scores.

What mmdet's `BaseDenseHead` and `RPNHead` select is selected, in their order. Heads with a selection of their own, and
heads without a sigmoid, stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.structures.bbox import cat_boxes, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from serve.ops.boxes.nms import nms_within_labels
from serve.ops.cpu.candidates import select_best

__all__ = ["install"]


def install(network: nn.Module) -> None:
    """Replace the selection of the heads of `network` that have mmdet's own, in place."""
    for head in network.modules():
        if not isinstance(head, BaseDenseHead):
            continue
        target: Any = head
        selection = getattr(type(head), "_predict_by_feat_single", None)
        if not getattr(head, "use_sigmoid_cls", False) or _has_own_activation(head):
            continue
        if selection is BaseDenseHead._predict_by_feat_single:
            target._predict_by_feat_single = _DenseSelection(head)
        elif selection is RPNHead._predict_by_feat_single and target.cls_out_channels == 1:
            target._predict_by_feat_single = _ProposalSelection(head)


def _has_own_activation(head: Any) -> bool:
    return bool(getattr(getattr(head, "loss_cls", None), "custom_cls_channels", False))


class _DenseSelection:
    """``BaseDenseHead._predict_by_feat_single``."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __call__(
        self,
        cls_score_list: Sequence[Tensor],
        bbox_pred_list: Sequence[Tensor],
        score_factor_list: Sequence[Tensor | None],
        mlvl_priors: Sequence[Any],
        img_meta: dict[str, Any],
        cfg: Any,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> Any:
        head = self._head
        cfg = head.test_cfg if cfg is None else cfg
        limit = cfg.get("nms_pre", -1)
        if limit < 0:  # upstream then leaves out the worst candidate
            return BaseDenseHead._predict_by_feat_single(
                head, cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors, img_meta,
                cfg, rescale, with_nms,
            )  # fmt: skip
        classes, width = head.cls_out_channels, head.bbox_coder.encode_size
        found: dict[str, list[Any]] = {"scores": [], "labels": [], "boxes": [], "priors": [], "factors": []}
        levels = zip(cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors, strict=True)
        for cls_score, bbox_pred, factor, priors in levels:
            scores, index = select_best(_rows(cls_score, classes).reshape(-1), cfg.get("score_thr", 0), limit)
            places = torch.div(index, classes, rounding_mode="floor")
            found["scores"].append(scores)
            found["labels"].append(index - places * classes)
            found["boxes"].append(_rows(bbox_pred, width)[places])
            found["priors"].append(priors[places])
            if factor is not None:
                found["factors"].append(_rows(factor, 1)[places, 0].sigmoid())
        results = InstanceData()
        results.bboxes = head.bbox_coder.decode(
            cat_boxes(found["priors"]), torch.cat(found["boxes"]), max_shape=img_meta["img_shape"]
        )
        results.scores, results.labels = torch.cat(found["scores"]), torch.cat(found["labels"])
        if found["factors"]:
            results.score_factors = torch.cat(found["factors"])
        if not with_nms or not self._suppresses_by_label(cfg):
            return head._bbox_post_process(
                results=results, cfg=cfg, rescale=rescale, with_nms=with_nms, img_meta=img_meta
            )
        results = head._bbox_post_process(
            results=results, cfg=cfg, rescale=rescale, with_nms=False, img_meta=img_meta
        )
        return results[_suppress(results, cfg)] if len(results) else results

    def _suppresses_by_label(self, cfg: Any) -> bool:
        """Return whether the head suppresses as mmdet's own does, by plain overlap within a class, up to a number."""
        plain = {*cfg.nms} <= {"type", "iou_threshold", "split_thr"} and cfg.nms.get("type", "nms") == "nms"
        own = type(self._head)._bbox_post_process is BaseDenseHead._bbox_post_process
        return bool(plain and own and cfg.max_per_img > 0)


def _suppress(results: Any, cfg: Any) -> Tensor:
    """Return the rows that ``mmcv.ops.batched_nms`` keeps, up to ``max_per_img``."""
    boxes = get_box_tensor(results.bboxes)
    # As there: classes are kept apart by shifting their boxes, which rounds them; many are compared class by class.
    shifted = boxes + (results.labels.to(boxes) * (boxes.max() + 1))[:, None]
    return nms_within_labels(
        shifted,
        results.scores,
        results.labels,
        cfg.nms.iou_threshold,
        cfg.max_per_img,
        across=len(boxes) < cfg.nms.get("split_thr", 10_000),
    )


class _ProposalSelection:
    """``RPNHead._predict_by_feat_single``."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __call__(
        self,
        cls_score_list: Sequence[Tensor],
        bbox_pred_list: Sequence[Tensor],
        score_factor_list: Sequence[Tensor | None],
        mlvl_priors: Sequence[Any],
        img_meta: dict[str, Any],
        cfg: Any,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> Any:
        head = self._head
        cfg = head.test_cfg if cfg is None else cfg
        limit, width = cfg.get("nms_pre", -1), head.bbox_coder.encode_size
        found: dict[str, list[Any]] = {"scores": [], "boxes": [], "priors": [], "levels": []}
        for level, (cls_score, bbox_pred, priors) in enumerate(
            zip(cls_score_list, bbox_pred_list, mlvl_priors, strict=True)
        ):
            logits, boxes = _rows(cls_score, 1).reshape(-1), _rows(bbox_pred, width)
            if 0 < limit < len(logits):
                scores, index = select_best(logits, -1.0, limit)
                boxes, priors = boxes[index], priors[index]
            else:
                scores = logits.sigmoid()
            found["scores"].append(scores)
            found["boxes"].append(boxes)
            found["priors"].append(priors)
            found["levels"].append(torch.full((len(scores),), level))
        results = InstanceData()
        results.bboxes = head.bbox_coder.decode(
            cat_boxes(found["priors"]), torch.cat(found["boxes"]), max_shape=img_meta["img_shape"]
        )
        results.scores, results.level_ids = torch.cat(found["scores"]), torch.cat(found["levels"])
        return head._bbox_post_process(results=results, cfg=cfg, rescale=rescale, img_meta=img_meta)


def _rows(level: Tensor, width: int) -> Tensor:
    """Return a map (C * width, H, W) as rows (H * W * C, width)."""
    return level.permute(1, 2, 0).reshape(-1, width)
