"""Heads for centres on a CPU that predict boxes only at the places that can become one.

CenterPoint's head predicts offset, height, size, heading and velocity of a box in every cell of the map, for every
task, and reads them at the few hundred best places of the task's heatmap. Here the heatmaps are computed first, then
the rest at those places (`MaskedBranches.compute_rows`), with the same bits. Upstream's own function decodes and
suppresses.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmdet3d.models.dense_heads.centerpoint_head import CenterHead, SeparateHead
from mmdet3d.models.task_modules.coders import CenterPointBBoxCoder
from torch import Tensor, nn

from serve.ops.cpu.candidates import select_best
from serve.runtime.masked import MaskedBranches, MaskedSequence

__all__ = ["is_known", "replace_tasks"]


def is_known(head: Any) -> bool:
    """Return whether `head` is mmdet3d's own, with its own coder and heads of its tasks."""
    own = type(head) is CenterHead and type(head.bbox_coder) is CenterPointBBoxCoder
    return own and all(type(task) is SeparateHead and "heatmap" in task.heads for task in head.task_heads)


def replace_tasks(head: Any, heatmaps: Sequence[MaskedSequence], boxes: Sequence[MaskedBranches]) -> None:
    """Replace the heads of the tasks, in place.

    Args:
        head: head for which `is_known` is true.
        heatmaps: the heatmap of each task.
        boxes: the other branches of each task.
    """
    head.heatmaps, head.task_heads = nn.ModuleList(heatmaps), nn.ModuleList(boxes)
    head.__class__ = SelectiveCenterHead


class SelectiveCenterHead(CenterHead):  # type: ignore[misc]
    """CenterHead that predicts boxes at the best places only; `forward` predicts them in all cells."""

    def forward_single(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Predict all maps of each task from a map (B, C, H, W)."""
        shared, heatmaps = self.predict_heatmaps([x])
        return [
            {**task(shared), "heatmap": heatmap}
            for task, heatmap in zip(self.task_heads, heatmaps, strict=True)
        ]

    def predict(
        self,
        pts_feats: Sequence[Tensor],
        batch_data_samples: Sequence[Any],
        rescale: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """Detect objects in the maps (B, C, H, W) of a neck; return the instances of each frame."""
        metas = [sample.metainfo for sample in batch_data_samples]
        return self.predict_boxes(*self.predict_heatmaps(pts_feats), metas)

    def predict_heatmaps(self, pts_feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return what the tasks share (B, C, H, W), and the logits (B, classes, H, W) of each task."""
        shared = self.shared_conv(pts_feats[0])
        return shared, [heatmap(shared) for heatmap in self.heatmaps]

    def predict_boxes(
        self, shared: Tensor, heatmaps: Sequence[Tensor], metas: Sequence[dict[str, Any]]
    ) -> list[Any]:
        """Return the instances of each frame."""
        # Frame by frame: torch rounds an exponential by its place in the tensor.
        maps: list[list[list[dict[str, Tensor]]]] = [[] for _ in metas]
        places: list[list[tuple[Tensor, ...]]] = [[] for _ in metas]
        for task, heatmap in zip(self.task_heads, heatmaps, strict=True):
            _, classes, height, width = heatmap.shape
            found = [self._best_places(logits) for logits in heatmap]
            cells = torch.cat([index % (height * width) for _, index in found]).numpy()
            frames = np.repeat(np.arange(len(found)), [len(scores) for scores, _ in found])
            rows = task.compute_rows(shared, np.stack((frames, cells // width, cells % width), 1))
            for frame, (scores, index) in enumerate(found):
                own = frames == frame
                at = index % (height * width)
                kinds = torch.div(index, height * width, rounding_mode="floor")
                where = torch.div(at, width, rounding_mode="floor").float(), (at % width).float()
                one = {
                    name: torch.from_numpy(values[own]).t()[None, :, None] for name, values in rows.items()
                }
                one["heatmap"] = scores.new_zeros((1, classes, 1, len(scores)))
                maps[frame].append([one])
                order = torch.arange(len(scores))
                places[frame].append(tuple(each[None] for each in (scores, order, kinds.int(), *where)))
        results: list[Any] = []
        for one_maps, one_places, meta in zip(maps, places, metas, strict=True):
            results += CenterHead.predict_by_feat(self._with_places(one_places), one_maps, [meta])
        return results

    def _best_places(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and places, among (classes, H, W), of the best logits; one of no score if all are too low."""
        threshold = self.bbox_coder.score_threshold
        scores, index = select_best(logits.flatten(), threshold or -1.0, self.bbox_coder.max_num)
        if len(scores) == 0:  # upstream's coder needs one, and leaves it out
            return logits.new_zeros(1), index.new_zeros(1)
        return scores, index

    def _with_places(self, places: Sequence[tuple[Tensor, ...]]) -> SelectiveCenterHead:
        """Return the head with a coder that has selected the places of each task already."""
        head, coder = copy.copy(self), copy.copy(self.bbox_coder)
        order = iter(places)

        def select(scores: Tensor, K: int) -> tuple[Tensor, ...]:
            selected = next(order)
            coder.max_num = selected[0].shape[1]
            return selected

        coder._topk = select
        head.bbox_coder = coder
        return head
