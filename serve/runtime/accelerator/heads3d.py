"""Selection of 3D boxes on an accelerator: candidates are chosen there, and everything behind runs on the processor.

A head scores some hundred thousand places, of which a few hundred can become boxes. Those are found by `topk` of a
fixed size for all frames of a batch, and brought over in one transfer. There, upstream's own function decodes them,
suppresses by overlap and picks, on maps that have only these places.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from serve.ops.constants import constant
from serve.runtime.accelerator.graphs import GraphCache, record_forward
from serve.runtime.accelerator.replace import overrides
from serve.runtime.accelerator.transfer import download

__all__ = ["install"]


def install(network: nn.Module, graphs: GraphCache | None = None) -> None:
    """Replace the selection of every head of a known kind; with `graphs`, record its convolutions as a CUDA graph."""
    from mmdet3d.models.dense_heads import Anchor3DHead, CenterHead
    from mmdet3d.models.dense_heads.base_3d_dense_head import Base3DDenseHead
    from mmdet3d.models.task_modules.coders import CenterPointBBoxCoder

    part: Any
    for part in network.modules():
        if isinstance(part, Anchor3DHead) and not overrides(
            part, Base3DDenseHead, "predict", "predict_by_feat", "_predict_by_feat_single"
        ):
            part.predict_by_feat = _AnchorSelection(part)
            record_forward(part, graphs)
        elif (
            isinstance(part, CenterHead)
            and not overrides(part, CenterHead, "predict", "predict_by_feat", "get_task_detections")
            and type(part.bbox_coder) is CenterPointBBoxCoder
        ):
            part.predict_by_feat = _CenterSelection(part)
            record_forward(part, graphs)


class _AnchorSelection:
    """``Base3DDenseHead.predict_by_feat`` of anchor heads."""

    def __init__(self, head: Any) -> None:
        self._head = head
        self._anchors: dict[tuple[Any, ...], list[Tensor]] = {}

    def __call__(
        self,
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        dir_cls_preds: Sequence[Tensor],
        batch_input_metas: Sequence[dict[str, Any]] | None = None,
        cfg: Any = None,
        rescale: bool = False,
        **more: Any,
    ) -> list[Any]:
        head = self._head
        assert batch_input_metas is not None
        limit = int((head.test_cfg if cfg is None else cfg).get("nms_pre", -1))
        widths = (head.num_classes, head.box_code_size, 2)
        picked: list[Tensor] = []
        for maps in zip(cls_scores, bbox_preds, dir_cls_preds, strict=True):
            scores, boxes, directions = (
                one.permute(0, 2, 3, 1).reshape(len(one), -1, width)
                for one, width in zip(maps, widths, strict=True)
            )
            rows: Tensor | None = None
            if 0 < limit < scores.shape[1]:
                best = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
                rows = best.amax(dim=2).topk(limit).indices
                scores, boxes, directions = (
                    one.gather(1, rows[..., None].expand(-1, -1, one.shape[2]))
                    for one in (scores, boxes, directions)
                )
            else:
                rows = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
            picked += [scores, boxes, directions, rows]
        held = download(picked)
        anchors = self._anchors_for([tuple(one.shape[-2:]) for one in cls_scores])
        levels = range(0, len(held), 4)
        return [
            head._predict_by_feat_single(
                cls_score_list=[_as_map(held[i][frame]) for i in levels],
                bbox_pred_list=[_as_map(held[i + 1][frame]) for i in levels],
                dir_cls_pred_list=[_as_map(held[i + 2][frame]) for i in levels],
                mlvl_priors=[anchors[i // 4][held[i + 3][frame]] for i in levels],
                input_meta=meta,
                cfg=cfg,
                rescale=rescale,
                **more,
            )
            for frame, meta in enumerate(batch_input_metas)
        ]

    def _anchors_for(self, sizes: list[tuple[int, ...]]) -> list[Tensor]:
        """Return the anchors (N, box) of each level on the CPU, made once per size of map."""
        key = tuple(sizes)
        if key not in self._anchors:
            if len(self._anchors) >= 4:
                self._anchors.clear()
            made = self._head.prior_generator.grid_anchors(sizes, device="cpu")
            self._anchors[key] = [one.reshape(-1, self._head.box_code_size) for one in made]
        return self._anchors[key]


def _as_map(rows: Tensor) -> Tensor:
    """View (N, C) rows as a map (C, N, 1), in half precision's float32."""
    return rows.float().t()[..., None]


class _CenterSelection:
    """``CenterHead.predict_by_feat``: the best places of all tasks and classes by two `topk`."""

    def __init__(self, head: Any) -> None:
        self._head = head
        self._classes = tuple(int(count) for count in head.num_classes)
        # The columns of a task's classes among all, padded with one that scores nothing.
        widest, start, none = max(self._classes), 0, sum(self._classes)
        columns = []
        for count in self._classes:
            columns.append([*range(start, start + count), *[none] * (widest - count)])
            start += count
        self._columns = tuple(map(tuple, columns))

    def __call__(
        self,
        preds_dicts: Sequence[Sequence[dict[str, Tensor]]],
        batch_input_metas: Any,
        *args: Any,
        **more: Any,
    ) -> list[Any]:
        from mmdet3d.models.dense_heads import CenterHead

        head = self._head
        tasks = [one[0] for one in preds_dicts]
        limit = head.bbox_coder.max_num
        names: list[str] = [name for name in ("reg", "height", "dim", "rot", "vel") if name in tasks[0]]
        heat = torch.cat([task["heatmap"] for task in tasks], dim=1).sigmoid().flatten(2)
        width = tasks[0]["heatmap"].shape[3]
        scores, cells = heat.topk(limit)
        batch, columns = len(heat), constant(self._columns, torch.int64, heat.device)
        scores = nn.functional.pad(scores, (0, 0, 0, 1), value=-torch.inf)[:, columns]
        cells = nn.functional.pad(cells, (0, 0, 0, 1))[:, columns]
        scores, best = scores.flatten(2).topk(limit)
        cells = cells.flatten(2).gather(2, best)
        boxes = torch.cat([task[name] for task in tasks for name in names], dim=1)
        boxes = boxes.view(batch, len(tasks), -1, heat.shape[2])
        boxes = boxes.gather(3, cells[:, :, None].expand(-1, -1, boxes.shape[2], -1))
        boxes, scores, cells, classes = download([boxes, scores, cells, best // limit])
        boxes, scores = boxes.float(), scores.float()
        chosen: list[Any] = []
        selected: list[tuple[Tensor, ...]] = []
        for t, task in enumerate(tasks):
            parts = torch.split(boxes[:, t], [task[name].shape[1] for name in names], dim=1)
            maps: dict[str, Tensor] = {
                name: part[:, :, None] for name, part in zip(names, parts, strict=True)
            }
            maps["heatmap"] = boxes.new_zeros((batch, self._classes[t], 1, limit))
            chosen.append([maps])
            rows = torch.arange(limit).expand(batch, -1)
            at = cells[:, t]
            selected.append(
                (scores[:, t], rows, classes[:, t].int(), (at // width).float(), (at % width).float())
            )
        found: list[Any] = CenterHead.predict_by_feat(self._on_processor(selected), chosen, batch_input_metas)
        return found

    def _on_processor(self, selected: list[tuple[Tensor, ...]]) -> Any:
        """Return the head with a coder that has selected already, task by task."""
        head = copy.copy(self._head)
        coder = copy.copy(head.bbox_coder)
        order = iter(selected)
        coder._topk = lambda scores, K: next(order)
        head.bbox_coder = coder
        return head
