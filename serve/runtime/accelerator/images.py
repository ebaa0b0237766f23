"""Two-stage detectors of images on an accelerator: proposals, regions, boxes and masks with a transfer each.

What is many is computed on the device (scores of all places, overlaps of all proposals, pixels of all masks); what is
greedy or small is decided on the processor, which has the boxes from then on. So no stage waits in order to learn how
many rows another has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.ops.boxes.nms import pack_bits, scan_bits, suppression_bits
from serve.ops.constants import constant
from serve.ops.roi.pyramid import align_pyramid
from serve.runtime.accelerator.graphs import GraphCache, record_forward
from serve.runtime.accelerator.replace import overrides
from serve.runtime.accelerator.transfer import download, upload

__all__ = ["install"]

# Candidates that are fetched at once; more take a second transfer.
MAX_CANDIDATES = 4096
# Bytes of pasted masks at a time, as in mmdet.
MAX_PASTED = 1 << 30
MAX_PRIORS = 8
FAR = -4.0  # outside of any mask, whose width reaches from -1 to 1


def install(network: nn.Module, graphs: GraphCache | None = None) -> None:
    """Replace priors, proposals and regions; boxes and masks too, where nothing between asks for proposals.

    With `graphs`, backbone, neck and the convolutions that propose are recorded as CUDA graphs.
    """
    from mmdet.models.dense_heads import RPNHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads import StandardRoIHead
    from mmdet.models.roi_heads.bbox_heads import BBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    _record_features(network, graphs)
    part: Any
    for part in list(network.modules()):
        if hasattr(part, "prior_generator") and hasattr(part.prior_generator, "grid_priors"):
            _keep_priors(part.prior_generator)
        if isinstance(part, SingleRoIExtractor) and _aligns(part):
            part.forward = _Regions(part)
    head: Any = getattr(network, "roi_head", None)
    # Only there are proposals and boxes read by replaced parts alone.
    whole = (
        type(head) is StandardRoIHead
        and not head.with_shared_head
        and isinstance(head.bbox_roi_extractor.forward, _Regions)
        and not overrides(head.bbox_head, BBoxHead, "predict_by_feat", "_predict_by_feat_single")
        and not head.bbox_head.custom_cls_channels
        and head.bbox_head.with_reg
        and head.bbox_head.predict_box_type == "hbox"
        and (
            not head.with_mask
            or (
                isinstance(head.mask_roi_extractor.forward, _Regions)
                and not overrides(
                    head.mask_head, FCNMaskHead, "predict_by_feat", "_predict_by_feat_single", "forward"
                )
                and head.test_cfg.mask_thr_binary >= 0
            )
        )
    )
    rpn: Any = getattr(network, "rpn_head", None)
    if (
        isinstance(rpn, RPNHead)
        and not overrides(rpn, BaseDenseHead, "predict", "predict_by_feat")
        and not overrides(rpn, RPNHead, "_predict_by_feat_single", "_bbox_post_process")
        and rpn.cls_out_channels == 1  # a sigmoid
        and _is_plain_nms(rpn.test_cfg.get("nms"))
    ):
        rpn.predict_by_feat = _Proposals(rpn, on_processor=whole)
    if whole:
        head.bbox_head.predict_by_feat = _Boxes(head.bbox_head)
        if head.with_mask:
            head.mask_head.predict_by_feat = _Masks(head.mask_head)


def _record_features(network: Any, graphs: GraphCache | None) -> None:
    from mmdet.models.dense_heads import AnchorHead
    from mmdet.models.detectors import SingleStageDetector, TwoStageDetector

    for kind in (SingleStageDetector, TwoStageDetector):
        if graphs is not None and isinstance(network, kind) and not overrides(network, kind, "extract_feat"):
            network.extract_feat = graphs.wrap(network.extract_feat)
    head = getattr(network, "rpn_head", None)
    if isinstance(head, AnchorHead) and not overrides(head, AnchorHead, "forward"):
        record_forward(head, graphs)


def _is_plain_nms(config: Any) -> bool:
    return config is not None and set(config) <= {"type", "iou_threshold"} and config.get("type") == "nms"


def _aligns(extractor: Any) -> bool:
    from mmcv.ops import RoIAlign

    layers = list(extractor.roi_layers)
    return (
        not overrides(extractor, type(extractor), "forward", "map_roi_levels", "roi_rescale")
        and type(extractor).__name__ == "SingleRoIExtractor"
        and all(type(layer) is RoIAlign and layer.pool_mode == "avg" for layer in layers)
        and len({(*layer.output_size, layer.sampling_ratio, layer.aligned) for layer in layers}) == 1
    )


def _keep_priors(generator: Any) -> None:
    """Have a generator keep the priors of the last few sizes of maps; they are never written to."""
    if "grid_priors" in vars(generator):
        return
    make = generator.grid_priors
    kept: dict[Any, Any] = {}

    def grid_priors(featmap_sizes: Any, *more: Any, **named: Any) -> Any:
        key = (tuple(map(tuple, featmap_sizes)), more, tuple(sorted(named.items(), key=lambda item: item[0])))
        if key not in kept:
            if len(kept) >= MAX_PRIORS:
                kept.clear()
            kept[key] = make(featmap_sizes, *more, **named)
        return list(kept[key])

    generator.grid_priors = grid_priors


class _Proposals:
    """``RPNHead.predict_by_feat``: overlaps on the device, the greedy choice on the processor."""

    def __init__(self, head: Any, *, on_processor: bool) -> None:
        """Leave the proposals on the processor if `on_processor`."""
        self._head, self._on_processor = head, on_processor

    def __call__(
        self,
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        score_factors: Any = None,
        batch_img_metas: Any = None,
        cfg: Any = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> list[Any]:
        from mmengine.structures import InstanceData

        head = self._head
        cfg = head.test_cfg if cfg is None else cfg
        device = cls_scores[0].device
        sizes = [one.shape[-2:] for one in cls_scores]
        priors = head.prior_generator.grid_priors(sizes, dtype=cls_scores[0].dtype, device=device)
        scores, boxes, levels = self._best(cls_scores, bbox_preds, priors, int(cfg.get("nms_pre", -1)))
        fetched: list[Tensor] = []
        for frame, meta in enumerate(batch_img_metas):
            decoded = head.bbox_coder.decode(*boxes[frame], max_shape=meta["img_shape"])
            fetched += self._overlaps(decoded, scores[frame], levels, cfg)
        held = download(fetched)
        found = []
        for frame in range(len(batch_img_metas)):
            decoded, ranked, bits = held[3 * frame : 3 * frame + 3]
            valid = int((ranked > -torch.inf).sum())
            keep = torch.from_numpy(scan_bits(bits, valid, int(cfg.max_per_img)))
            results = InstanceData()
            results.bboxes, results.scores = decoded[keep], ranked[keep]
            results.labels = torch.zeros(len(keep), dtype=torch.long)
            found.append(results if self._on_processor else results.to(device))
        return found

    def _best(
        self, cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor], priors: Sequence[Tensor], limit: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
        """Choose the best places of each level.

        Returns:
            (B, N) scores; per frame (N, 4) priors and (N, 4) deltas; (N,) level.
        """
        head, batch = self._head, len(cls_scores[0])
        scores, deltas, chosen, levels = [], [], [], []
        for level, (cls_score, bbox_pred, prior) in enumerate(
            zip(cls_scores, bbox_preds, priors, strict=True)
        ):
            flat = cls_score.permute(0, 2, 3, 1).reshape(batch, -1)
            delta = bbox_pred.permute(0, 2, 3, 1).reshape(batch, -1, head.bbox_coder.encode_size)
            flat = flat.sigmoid()
            at = prior.expand(batch, -1, -1)
            if 0 < limit < flat.shape[1]:
                flat, rows = torch.sort(flat, dim=1, descending=True, stable=True)
                flat, rows = flat[:, :limit], rows[:, :limit]
                places = rows[..., None].expand(-1, -1, delta.shape[2])
                delta, at = delta.gather(1, places), at.gather(1, places)
            scores.append(flat)
            deltas.append(delta)
            chosen.append(at)
            levels += [level] * flat.shape[1]
        joined, around = torch.cat(deltas, dim=1), torch.cat(chosen, dim=1)
        pairs = [(around[frame], joined[frame]) for frame in range(batch)]
        return torch.cat(scores, dim=1), pairs, constant(tuple(levels), joined.dtype, joined.device)

    def _overlaps(self, boxes: Tensor, scores: Tensor, levels: Tensor, cfg: Any) -> list[Tensor]:
        """Order boxes by score, invalid ones last with a score of minus infinity; find which drops which."""
        least = float(cfg.get("min_bbox_size", -1))
        spread = boxes
        if least >= 0:
            sides = boxes[:, 2:] - boxes[:, :2]
            valid = (sides > least).all(dim=1)
            scores = scores.masked_fill(~valid, -torch.inf)
            spread = boxes.masked_fill(~valid[:, None], -torch.inf)
        # Levels are kept apart as in mmcv's `batched_nms`.
        apart = boxes + (levels * (spread.max() + 1))[:, None]
        ranked, order = torch.sort(scores, descending=True, stable=True)
        bits = suppression_bits(apart[order].float(), 0.0, float(cfg.nms.iou_threshold))
        return [boxes[order], ranked, bits]


class _Regions:
    """``SingleRoIExtractor.forward``: all levels at once, for regions on the device or the processor."""

    def __init__(self, extractor: Any) -> None:
        self._extractor = extractor

    def __call__(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        extractor, layer = self._extractor, self._extractor.roi_layers[0]
        levels = extractor.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = extractor.roi_rescale(rois, roi_scale_factor)
        return align_pyramid(
            list(feats), rois, levels, [one.spatial_scale for one in extractor.roi_layers],
            tuple(layer.output_size), sampling_ratio=layer.sampling_ratio, aligned=layer.aligned,
        )  # fmt: skip


class _Boxes:
    """``BBoxHead.predict_by_feat``: candidates above the threshold are fetched, and decoded on the processor."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __call__(
        self,
        rois: Sequence[Tensor],
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        batch_img_metas: Sequence[dict[str, Any]],
        rcnn_test_cfg: Any = None,
        rescale: bool = False,
    ) -> list[Any]:
        from mmdet.models.roi_heads.bbox_heads import BBoxHead

        head = self._head
        if rcnn_test_cfg is None or any(len(one) == 0 for one in rois):
            return BBoxHead.predict_by_feat(  # type: ignore[no-any-return]
                head, rois, cls_scores, bbox_preds, batch_img_metas, rcnn_test_cfg, rescale
            )
        threshold = float(rcnn_test_cfg.score_thr)
        flat = [one.softmax(dim=-1)[:, :-1].reshape(-1) for one in cls_scores]
        deltas = [one.reshape(len(one), -1, head.bbox_coder.encode_size) for one in bbox_preds]
        found = self._fetch(flat, deltas, threshold, [MAX_CANDIDATES] * len(flat))
        counts = [int(one[0]) for one in found]
        if max(counts) > MAX_CANDIDATES:
            found = self._fetch(flat, deltas, threshold, counts)
        return [
            self._select(roi, one[1][:count], one[2][:count], one[3][:count], meta, rcnn_test_cfg, rescale)
            for roi, one, count, meta in zip(rois, found, counts, batch_img_metas, strict=True)
        ]

    def _fetch(
        self, scores: Sequence[Tensor], deltas: Sequence[Tensor], threshold: float, limits: Sequence[int]
    ) -> list[list[Tensor]]:
        """Fetch, per frame: the number of scores above the threshold; the best scores, their places and deltas."""
        parts = []
        for one, delta, limit in zip(scores, deltas, limits, strict=True):
            best, place = one.topk(min(limit, len(one)))
            column = place % self._head.num_classes if delta.shape[1] > 1 else torch.zeros_like(place)
            row = place // self._head.num_classes
            parts += [(one > threshold).sum()[None], best, place, delta[row, column]]
        held = download(parts)
        return [held[i : i + 4] for i in range(0, len(held), 4)]

    def _select(
        self,
        rois: Tensor,
        scores: Tensor,
        places: Tensor,
        deltas: Tensor,
        meta: dict[str, Any],
        config: Any,
        rescale: bool,
    ) -> Any:
        from mmcv.ops import batched_nms
        from mmdet.structures.bbox import scale_boxes
        from mmengine.structures import InstanceData

        # By place, as `nonzero` finds them: equal scores keep this order.
        order = torch.argsort(places)
        places, scores, deltas = places[order], scores[order].float(), deltas[order].float()
        labels = places % self._head.num_classes
        around = rois[places // self._head.num_classes, 1:]
        boxes = self._head.bbox_coder.decode(around, deltas, max_shape=meta["img_shape"])
        if rescale:
            boxes = scale_boxes(boxes, [1 / factor for factor in meta["scale_factor"]])
        results = InstanceData()
        if len(boxes) == 0:
            results.bboxes, results.scores, results.labels = boxes, scores, labels
            return results
        kept, rows = batched_nms(boxes, scores, labels, config.nms)
        limit = config.max_per_img if config.max_per_img > 0 else len(kept)
        results.bboxes, results.scores = kept[:limit, :-1], kept[:limit, -1]
        results.labels = labels[rows[:limit]]
        return results


class _Masks:
    """``FCNMaskHead.predict_by_feat``: all masks of an image are pasted at once and fetched as bits."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __call__(
        self,
        mask_preds: Sequence[Tensor],
        results_list: list[Any],
        batch_img_metas: Sequence[dict[str, Any]],
        rcnn_test_cfg: Any,
        rescale: bool = False,
        activate_map: bool = False,
    ) -> list[Any]:
        from mmdet.models.roi_heads.mask_heads import FCNMaskHead

        if activate_map or any(len(results) == 0 for results in results_list):
            results_list = [results.to(mask_preds[0].device) for results in results_list]
            return FCNMaskHead.predict_by_feat(  # type: ignore[no-any-return]
                self._head, mask_preds, results_list, batch_img_metas, rcnn_test_cfg, rescale, activate_map
            )
        parts, shapes = [], []
        for logits, results, meta in zip(mask_preds, results_list, batch_img_metas, strict=True):
            height, width = meta["ori_shape"][:2]
            factor = results.bboxes.new_tensor(meta["scale_factor"]).repeat((1, 2))
            if rescale:
                results.bboxes /= factor
            else:
                width = int(np.round(width * factor[0, 0].item()).astype(np.int32))
                height = int(np.round(height * factor[0, 1].item()).astype(np.int32))
            masks = self._of_class(logits, results.labels)
            boxes = upload(results.bboxes, masks.device)
            step = max(1, MAX_PASTED // (4 * height * width))
            for first in range(0, len(masks), step):
                part = slice(first, first + step)
                pasted = _paste(masks[part], boxes[part], height, width)
                parts.append(pack_bits((pasted >= rcnn_test_cfg.mask_thr_binary).flatten(1)))
            shapes.append((len(masks), height, width))
        held = torch.cat([one.flatten() for one in download(parts)])
        for results, shape in zip(results_list, shapes, strict=True):
            row = -(-shape[1] * shape[2] // 64) * 8
            bits, held = held[: shape[0] * row], held[shape[0] * row :]
            flat = np.unpackbits(
                bits.view(shape[0], row).numpy(), axis=1, count=shape[1] * shape[2], bitorder="little"
            )
            results.masks = torch.from_numpy(flat.view(np.bool_)).view(shape)
        return results_list

    def _of_class(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return (N, h, w) probabilities of each mask's own class."""
        if self._head.class_agnostic:
            return logits[:, 0].sigmoid()
        rows = torch.arange(len(labels)) * logits.shape[1] + labels
        return logits.flatten(0, 1).index_select(0, upload(rows, logits.device)).sigmoid()


def _paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Sample masks (N, h, w) at the pixels of an image, given their boxes (N, 4); (N, height, width) float32."""

    def grid(size: int, low: Tensor, high: Tensor) -> Tensor:
        pixels = torch.arange(size, device=masks.device, dtype=torch.float32) + 0.5
        places = (pixels - low[:, None]) / (high - low)[:, None] * 2 - 1
        places = places.masked_fill(places.isinf(), 0.0)  # a box without extent
        # On the CPU mmdet pastes into the box and one pixel around it.
        near = (pixels > low.floor()[:, None] - 1) & (pixels < high.ceil()[:, None] + 1)
        return places.masked_fill(~near, FAR)

    x, y = grid(width, boxes[:, 0], boxes[:, 2]), grid(height, boxes[:, 1], boxes[:, 3])
    shape = (len(masks), height, width)
    places = torch.stack((x[:, None, :].expand(shape), y[:, :, None].expand(shape)), dim=3)
    return functional.grid_sample(masks[:, None].float(), places, align_corners=False)[:, 0]
