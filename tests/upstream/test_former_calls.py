"""Calls of mmdet 2.x on models of today, and inferencers without a visualizer."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from serve.upstream import patches
from tests.conftest import ASSETS, DEMO_CHECKPOINT, DEMO_CONFIG
from tests.e2e.small_models import write

patches.apply()

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    from serve.convert.golden import golden_image

    path = tmp_path_factory.mktemp("picture") / "street.png"
    cv2.imwrite(str(path), golden_image())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    from mmdet.apis import init_detector

    config, checkpoint = write("rtmdet", tmp_path_factory.mktemp("model"))
    return init_detector(str(config), str(checkpoint), device="cpu", palette="random")


def test_show_result_writes_or_returns_the_picture_with_boxes(model, picture, tmp_path):
    from mmdet.apis import inference_detector

    result = inference_detector(model, str(picture))
    score_thr = float(result.pred_instances.scores[3])
    with pytest.warns(DeprecationWarning, match="DetInferencer"):
        drawn = model.show_result(str(picture), result, score_thr=score_thr)
    image = cv2.imread(str(picture))
    assert drawn.shape == image.shape and (drawn != image).any()
    assert (model.show_result(image, result, score_thr=score_thr) == drawn).all()
    # Nothing is drawn above the best score, and colours are not swapped.
    assert (model.show_result(image, result, score_thr=1.0) == image).all()
    assert model.show_result(image, result, score_thr=score_thr, out_file=str(tmp_path / "r.png")) is None
    assert (cv2.imread(str(tmp_path / "r.png")) == drawn).all()


def test_async_inference_gives_the_same_results_beside_a_running_loop(model, picture):
    from mmdet.apis import async_inference_detector, inference_detector
    from mmdet.utils.contextmanagers import concurrent

    threads: set[str] = set()
    hook = model.register_forward_pre_hook(lambda *_: threads.add(threading.current_thread().name))
    streams: asyncio.Queue[Any] = asyncio.Queue()

    async def detect(image: Any) -> Any:
        async with concurrent(streams):
            return await async_inference_detector(model, image)

    async def main() -> list[Any]:
        return await asyncio.gather(
            detect(str(picture)), detect(cv2.imread(str(picture))), detect([str(picture)] * 2)
        )

    try:
        one, other, two = asyncio.run(main())
    finally:
        hook.remove()
    expected = inference_detector(model, str(picture)).pred_instances.scores
    # torch's number of threads is set per thread, and random weights make more of what it changes in the last bits.
    for found in (one, other, *two):
        np.testing.assert_allclose(found.pred_instances.scores, expected, rtol=0, atol=1e-4)
    assert threads and threading.main_thread().name not in threads


def test_inferencers_need_no_visualizer_in_the_config(picture, tmp_path):
    from mmdet3d.apis import LidarDet3DInferencer
    from mmengine.config import Config

    assert "visualizer" not in Config.fromfile(str(DEMO_CONFIG))
    inferencer = LidarDet3DInferencer(str(DEMO_CONFIG), str(DEMO_CHECKPOINT), device="cpu")
    asked = {"points": str(ASSETS / "sample.bin")}
    assert inferencer(asked, no_save_vis=True)["predictions"][0]["scores_3d"]

    from mmdet.apis import DetInferencer

    config, checkpoint = write("rtmdet", tmp_path)
    without = Config.fromfile(str(config))
    del without._cfg_dict["visualizer"]
    without.dump(str(config))
    inferencer = DetInferencer(str(config), str(checkpoint), device="cpu", palette="random")
    inferencer(str(picture), out_dir=str(tmp_path / "out"), pred_score_thr=0.0)
    assert (tmp_path / "out" / "vis" / "street.png").is_file()
