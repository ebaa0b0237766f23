"""Upstream's own functions and inferencers run in our environment and find what the served model finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.predict import LocalModel, predict
from serve.upstream import patches
from tests.conftest import ASSETS, DEMO_CHECKPOINT, DEMO_CONFIG
from tests.e2e.small_models import write

patches.apply()

# Upstream warns of its own deprecations.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SAMPLE = ASSETS / "sample.bin"


@pytest.fixture(scope="module")
def expected(second: LocalModel) -> Any:
    (found,) = predict(SAMPLE, second)
    assert found.answer
    return found.answer


def assert_equal(boxes: Any, scores: Any, expected: Any) -> None:
    order = np.argsort(-np.asarray(scores), kind="stable")
    assert np.asarray(scores)[order] == pytest.approx(np.asarray(expected["scores_3d"]), abs=1e-4)
    assert np.asarray(boxes)[order][:5] == pytest.approx(np.asarray(expected["bboxes_3d"])[:5], abs=1e-3)


def test_init_model_and_inference_detector_of_mmdet3d(expected: Any) -> None:
    from mmdet3d.apis import inference_detector, init_model

    model = init_model(str(DEMO_CONFIG), str(DEMO_CHECKPOINT), device="cpu")
    result, _ = inference_detector(model, str(SAMPLE))
    found = result.pred_instances_3d
    assert_equal(found.bboxes_3d.tensor.numpy(), found.scores_3d.numpy(), expected)


def test_lidar_inferencer_without_the_package_for_meshes(expected: Any, tmp_path: Path) -> None:
    from mmdet3d.apis import LidarDet3DInferencer

    # Upstream's inferencers want a visualizer, which every config of the zoo has.
    config = tmp_path / "with_visualizer.py"
    config.write_text(
        f'_base_ = ["{DEMO_CONFIG}"]\nvisualizer = dict(type="Det3DLocalVisualizer", name="visualizer")\n'
    )
    inferencer = LidarDet3DInferencer(str(config), str(DEMO_CHECKPOINT), device="cpu")
    found = inferencer({"points": str(SAMPLE)}, out_dir=str(tmp_path), no_save_vis=True)["predictions"][0]
    assert_equal(found["bboxes_3d"], found["scores_3d"], expected)
    (written,) = (tmp_path / "preds").glob("*.json")
    assert json.loads(written.read_text())["scores_3d"] == found["scores_3d"]


def test_mono_inferencer(tmp_path: Path) -> None:
    import cv2
    from mmdet3d.apis import MonoDet3DInferencer

    from serve.convert.golden import golden_image

    config, checkpoint = write("mono3d", tmp_path)
    cv2.imwrite(str(tmp_path / "street.png"), golden_image())
    camera = {
        "img_path": "street.png",
        "cam2img": [[520, 0, 320], [0, 520, 240], [0, 0, 1]],
        "lidar2cam": np.eye(4).tolist(),
        "lidar2img": np.eye(4).tolist(),
    }
    infos = tmp_path / "infos.json"
    infos.write_text(json.dumps({"data_list": [{"images": {"CAM2": camera}}]}))
    inferencer = MonoDet3DInferencer(str(config), str(checkpoint), device="cpu")
    asked = {"img": str(tmp_path / "street.png"), "infos": str(infos)}
    found = inferencer(asked, out_dir=str(tmp_path / "out"), no_save_vis=True)["predictions"][0]
    assert len(found["bboxes_3d"]) == len(found["scores_3d"]) == len(found["labels_3d"]) > 0


def test_init_detector_a_list_of_images_and_the_inferencer_of_mmdet(tmp_path: Path) -> None:
    import cv2
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    from serve.convert.golden import golden_image

    config, checkpoint = write("rtmdet", tmp_path)
    path = tmp_path / "street.png"
    cv2.imwrite(str(path), golden_image())
    model = init_detector(str(config), str(checkpoint), device="cpu", palette="random")
    one, _ = inference_detector(model, [str(path), str(path)])
    other = inference_detector(model, cv2.imread(str(path)))
    assert one.pred_instances.scores.tolist() == other.pred_instances.scores.tolist()
    inferencer = DetInferencer(str(config), str(checkpoint), device="cpu", palette="random")
    found = inferencer(str(path), out_dir=str(tmp_path / "out"), no_save_pred=False)["predictions"][0]
    assert found["scores"] == pytest.approx(one.pred_instances.scores.tolist(), abs=1e-5)
    assert (tmp_path / "out" / "preds" / "street.json").is_file()
    assert (tmp_path / "out" / "vis" / "street.png").is_file()
