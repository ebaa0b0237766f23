"""Calls of mmdet 2.x that upstream dropped or broke, on models of today: `show_result`, `async_inference_detector`.

Pages and notebooks print them still. Each warns once, with the call or command of today.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["add_show_result", "default_visualizer", "mend_inference"]

# One network at a time: the kernels and the network use every core, and models keep state while they run.
_NETWORK = threading.Lock()


def add_show_result(module: ModuleType) -> None:
    """Give `mmdet.models.detectors.BaseDetector` the method `show_result` of 2.x."""
    module.__dict__["BaseDetector"].show_result = show_result


def show_result(
    model: Any,
    img: str | np.ndarray,
    result: Any,
    score_thr: float = 0.3,
    *_: Any,
    show: bool = False,
    wait_time: float = 0,
    out_file: str | None = None,
    win_name: str = "",
    **__: Any,
) -> np.ndarray | None:
    """Draw detections by the visualizer of the model's config.

    Args:
        model: from ``init_detector``.
        img: path, or image as (height, width, 3) uint8, BGR.
        result: from ``inference_detector``.
        score_thr: lowest score that is drawn.
        show: open a window, which needs a display.
        wait_time: seconds until the window closes; 0 waits for a key.
        out_file: picture to write; no window is opened then.
        win_name: title of the window.

    Returns:
        The drawn image, (height, width, 3) uint8 BGR; None if it was shown or written. Colours, line widths and font
        sizes, which 2.x took too, are those of the visualizer.
    """
    import mmcv

    _warn(
        "model.show_result(img, result, out_file=…)",
        "DetInferencer(…)(img, out_dir=…), or `mmdet3d-serve predict IMG --model CFG --checkpoint CKPT --out PICTURE`",
    )
    picture = mmcv.imread(img) if isinstance(img, str | Path) else img
    visualizer = _visualizer(model)
    visualizer.add_datasample(
        win_name or "result",
        mmcv.imconvert(picture, "bgr", "rgb"),
        data_sample=result,
        draw_gt=False,
        show=show and out_file is None,
        wait_time=wait_time,
        pred_score_thr=score_thr,
    )
    drawn: np.ndarray = mmcv.imconvert(visualizer.get_image(), "rgb", "bgr")
    if out_file is not None:
        mmcv.imwrite(drawn, out_file)
    return None if show or out_file is not None else drawn


def _visualizer(model: Any) -> Any:
    made = model.__dict__.get("_visualizer_of_show_result")
    if made is None:
        from mmdet.visualization import DetLocalVisualizer

        made = DetLocalVisualizer(name=f"show_result-{id(model)}")
        made.dataset_meta = model.dataset_meta
        model.__dict__["_visualizer_of_show_result"] = made
    return made


def mend_inference(module: ModuleType) -> None:
    """Replace `async_inference_detector`, which reads ``cfg.data``, as configs of 2.x have it.

    `inference_detector` is kept from writing the loader of arrays into the model's config, where paths would meet it.
    """
    pipeline_of = module.__dict__["get_test_pipeline_cfg"]
    module.__dict__["get_test_pipeline_cfg"] = lambda cfg: copy.deepcopy(pipeline_of(cfg))
    infer = module.__dict__["inference_detector"]

    async def async_inference_detector(model: Any, imgs: Any) -> Any:
        """Detect in an image, or in each of a list, without blocking the event loop.

        Returns what ``inference_detector`` does. The network runs in a thread, on the CUDA stream that is current in
        the task (``mmdet.utils.contextmanagers.concurrent``); one network runs at a time.
        """
        import torch

        _warn(
            "async_inference_detector",
            "serve.predict.AsyncPredictor, which also forms batches",
        )
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

        def run() -> Any:
            with _NETWORK, torch.cuda.stream(stream):
                found = infer(model, imgs)
                if stream is not None:
                    stream.synchronize()
                return found

        return await asyncio.to_thread(run)

    module.__dict__["async_inference_detector"] = async_inference_detector


def default_visualizer(name: str, kind: str) -> Any:
    """Make a correction that gives inferencers a visualizer if the config names none (mmdetection#11792).

    Args:
        name: class of the inferencer in its module.
        kind: type of the visualizer.
    """

    def patch(module: ModuleType) -> None:
        inferencer = module.__dict__[name]
        initialize = inferencer._init_visualizer

        def _init_visualizer(self: Any, cfg: Any) -> Any:
            if "visualizer" not in cfg:
                cfg.visualizer = {"type": kind, "name": "visualizer"}
            return initialize(self, cfg)

        inferencer._init_visualizer = _init_visualizer

    return patch


def _warn(former: str, now: str) -> None:
    warnings.warn(f"{former} is of mmdet 2.x; today: {now}", DeprecationWarning, stacklevel=3)
