"""Single-stage image detectors on an accelerator: candidates are fetched at once, and suppressed on the processor.

mmdet's own function suppresses class by class where there are many candidates, and waits for the device several times
per class. There are a few thousand of them, chosen on the device; they come over in one transfer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from serve.runtime.accelerator.graphs import GraphCache, record_forward
from serve.runtime.accelerator.transfer import download

__all__ = ["install"]

# What mmdet's function reads; heads with more per candidate, such as kernels of masks, keep it on the device.
FIELDS = {"bboxes", "scores", "labels", "score_factors"}


def install(network: nn.Module, graphs: GraphCache | None = None) -> None:
    """Have the candidates of a single-stage detector fetched before they are suppressed.

    With `graphs`, its head's convolutions are recorded as a CUDA graph.
    """
    from mmdet.models.detectors import SingleStageDetector

    head: Any = getattr(network, "bbox_head", None)
    if not isinstance(network, SingleStageDetector):
        return
    record_forward(head, graphs)
    if hasattr(head, "_bbox_post_process"):
        head._bbox_post_process = _PostProcess(head._bbox_post_process)


class _PostProcess:
    """``_bbox_post_process`` of a head, on candidates in the processor's memory."""

    def __init__(self, process: Callable[..., Any]) -> None:
        self._process = process

    def __call__(self, results: Any, *args: Any, **named: Any) -> Any:
        from mmdet.structures.bbox import BaseBoxes
        from mmengine.structures import InstanceData

        fields = dict(results.items())
        if not set(fields) <= FIELDS:
            return self._process(results, *args, **named)
        values = [value.tensor if isinstance(value, BaseBoxes) else value for value in fields.values()]
        fetched = InstanceData(metainfo=results.metainfo)
        for (name, value), held in zip(fields.items(), download(values), strict=True):
            fetched[name] = type(value)(held, clone=False) if isinstance(value, BaseBoxes) else held
        return self._process(fetched, *args, **named)
