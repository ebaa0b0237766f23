"""What upstream's TorchServe path gets wrong, row by row, and what is true here.

The rows D1 to D19 are those of `docs/upstream-defects.md`: MMDetection3D 1.4.0 and MMDetection 3.3.0,
`tools/deployment`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from serve import archive
from serve.compare.detections import compare
from serve.errors import NonFinitePoints, UndecodableFrame
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.runtime import device_for, predictions
from serve.settings import Limits
from serve.verify.reference_loading import load_reference
from tests.conftest import DEMO_CHECKPOINT, DEMO_CONFIG, Context

TOOLS = Path(__file__).parents[2] / "tools" / "deployment"


@pytest.mark.slow
def test_d01_the_seeds_conversion_command_writes_an_archive(tmp_path):
    command = [
        TOOLS / "mmdet3d2torchserve.py",
        DEMO_CONFIG,
        DEMO_CHECKPOINT,
        "--output-folder",
        tmp_path / "store",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--model-name", "second"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert archive.verify(tmp_path / "store" / "second.mar").name == "second"
    assert "sha256" in done.stdout and "done" in done.stderr


def test_d02_custom_modules_and_extra_files_are_packed_into_the_archive(tmp_path):
    # tests/convert/test_conversion.py packs both through the converter; here they come out again.
    (tmp_path / "weights").write_bytes(b"")
    archive.write(
        tmp_path / "m.mar", archive.Metadata("m", "1.0", "lidar", "mmdet3d", (), "LiDAR", 4, None, "golden/f", {}),
        config={}, weights=tmp_path / "weights", golden_frame=b"", golden_expected={},
        code={"mine/a.py": b"x = 1"}, extra={"labels.txt": b"car"},
    )  # fmt: skip
    root = archive.extract(tmp_path / "m.mar", tmp_path / "opened").root
    assert (root / "code/mine/a.py").read_bytes() == b"x = 1" and (root / "extra/labels.txt").exists()


def test_d03_the_archive_records_hashes_classes_versions_and_input(demo_archive):
    metadata = demo_archive.metadata
    assert metadata.classes and metadata.load_dim == 4 and len(metadata.source["checkpoint_sha256"]) == 64
    assert {"torch", "mmcv-lite", "mmdet3d"} <= set(metadata.source) and metadata.files["weights.safetensors"]


def test_d04_no_gpu_id_means_cpu_even_where_cuda_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for(None).type == "cpu"


def test_d05_the_handler_loads_on_cpu(handler):
    assert handler.detector.device.type == "cpu"


def test_d06_n_rows_give_n_answers(ask, street):
    rows = ask(*[street.tobytes()] * 3)
    assert [status for status, _ in rows] == [200] * 3 and rows[0] == rows[1] == rows[2]


def test_d07_points_reach_the_pipeline_as_an_array(detector, street):
    prepared = detector.prepare(decode_frame(street.tobytes(), FrameSpec("lidar"), FrameOptions(), Limits()))
    assert prepared["inputs"]["points"].shape[1] == 4 and len(prepared["inputs"]["points"]) > 10_000


def test_d08_the_answer_has_todays_field_names(ask, street):
    ((_, answer),) = ask(street.tobytes())
    assert {"bboxes_3d", "scores_3d", "labels_3d", "box_type_3d"} <= set(answer)


class OnDevice(torch.Tensor):
    """A tensor that, like one on a GPU, gives no numpy array until it was brought to the host."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_d09_results_are_brought_to_the_host():
    class Found(dict):
        __getattr__ = dict.__getitem__

    found = Found(
        bboxes=torch.rand(3, 4).as_subclass(OnDevice),
        scores=torch.tensor([0.1, 0.9, 0.5]).as_subclass(OnDevice),
        labels=torch.tensor([0, 1, 0]).as_subclass(OnDevice),
        masks=torch.ones(3, 4, 4, dtype=torch.bool).as_subclass(OnDevice),
    )
    answer = predictions.postprocess(Found(pred_instances=found), ("a", "b"), None, {})
    assert answer["names"] == ["b", "a", "a"] and len(answer["masks"]) == 3


def test_d10_the_answer_says_class_convention_frame_and_units(ask, street):
    ((_, answer),) = ask(street.tobytes())
    assert len(answer["names"]) == len(answer["labels_3d"]) and answer["names"][0] in answer["classes"]
    assert answer["box_type_3d"] == "LiDAR"
    assert answer["units"] == {
        "length": "m", "angle": "rad", "frame": "x forward, y left, z up", "origin": "bottom centre",
    }  # fmt: skip


def test_d11_threshold_is_the_requests_and_point_size_the_models(ask, street, demo_archive):
    low, high = ask(
        street.tobytes(), street.tobytes(), headers=[{"X-Score-Thr": "0"}, {"X-Score-Thr": "0.5"}]
    )
    assert len(high[1]["scores_3d"]) < len(low[1]["scores_3d"])
    assert min(high[1]["scores_3d"], default=1) >= 0.5 and demo_archive.metadata.load_dim == 4


def test_d12_a_cloud_of_five_floats_is_not_reshaped_into_one_of_four(ask):
    twelve = np.random.default_rng(0).uniform(1, 2, (12, 5)).astype(np.float32)  # 60 floats: also 15 x 4
    answers = ask(
        {"body": twelve.tobytes(), "load_dim": b"5"},
        {"body": twelve.tobytes(), "num_points": b"12"},
        twelve[:11].tobytes(),
    )
    assert [status for status, _ in answers] == [422] * 3


def test_d13_a_clients_mistake_is_a_4xx_and_its_batch_mates_are_served(ask, street):
    rows = ask(
        b"",
        street.tobytes(),
        street.tobytes()[:-2],
        {"body": b"{"},
        headers=[{}, {}, {}, {"content-type": "application/json"}],
    )
    assert [status for status, _ in rows] == [422, 200, 422, 400]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_d14_what_is_not_finite_or_too_large_never_reaches_the_network(value):
    points = np.full((5, 4), value, dtype=np.float32)
    with pytest.raises(NonFinitePoints):
        decode_frame(points.tobytes(), FrameSpec("lidar"), FrameOptions(), Limits())
    with pytest.raises(Exception, match="limit is 4") as refused:
        decode_frame(points.tobytes(), FrameSpec("lidar"), FrameOptions(), Limits(max_points=4))
    assert refused.value.status == 413


def test_d15_inference_does_not_change_the_models_config(detector, street):
    before = orjson.dumps(detector.network.cfg.to_dict(), default=str)
    detector.run([decode_frame(street.tobytes(), FrameSpec("lidar"), FrameOptions(), Limits())] * 2)
    assert orjson.dumps(detector.network.cfg.to_dict(), default=str) == before


def test_d16_the_pipeline_is_built_once(detector, street, monkeypatch):
    from mmengine.dataset import Compose

    monkeypatch.setattr(Compose, "__init__", lambda *_: pytest.fail("built again"))
    detector.run([decode_frame(street.tobytes(), FrameSpec("lidar"), FrameOptions(), Limits())])


@pytest.fixture(scope="module")
def native():
    return load_reference(DEMO_CONFIG, DEMO_CHECKPOINT, "cpu")


def test_d17_the_test_reads_what_todays_inference_returns(native, street, tmp_path):
    (tmp_path / "frame.bin").write_bytes(street.tobytes())
    assert len(native.detect(tmp_path / "frame.bin")["bboxes_3d"]) > 0


def test_d18_the_test_compares_scores_and_labels_in_any_order(native, street, tmp_path):
    (tmp_path / "frame.bin").write_bytes(street.tobytes())
    found = native.detect(tmp_path / "frame.bin")
    count = len(found["scores_3d"])
    shuffled = {
        k: [v[i] for i in range(count)][::-1] if k in ("bboxes_3d", "scores_3d", "labels_3d", "names") else v
        for k, v in found.items()
    }
    assert compare(found, shuffled).ok
    wrong_score = {**found, "scores_3d": [float(found["scores_3d"][0]) + 0.01, *found["scores_3d"][1:]]}
    wrong_label = {**found, "labels_3d": [(int(found["labels_3d"][0]) + 1) % 3, *found["labels_3d"][1:]]}
    assert not compare(found, wrong_score).ok and not compare(found, wrong_label).ok


def test_d19_no_detections_on_both_sides_agree(native, tmp_path, ask):
    nothing = np.array([[200.0, 200.0, 50.0, 0.0]], dtype=np.float32)
    ((status, served),) = ask(nothing.tobytes())
    assert status == 200 and served["bboxes_3d"] == []
    (tmp_path / "frame.bin").write_bytes(nothing.tobytes())
    assert compare(native.detect(tmp_path / "frame.bin"), served).ok


def test_the_worker_survives_every_refusal(handler, demo_archive, street):
    context = Context(demo_archive.root)
    for body in (b"", b"x", street.tobytes()[:-1], b"\x00" * 15):
        handler.handle([{"body": body}], context)
        assert context.status[0][0] in (400, 422)
    handler.handle([{"body": street.tobytes()}], context)
    assert context.status[0][0] == 200
    with pytest.raises(UndecodableFrame):
        handler.detector.decode(b"", FrameOptions(), Limits())
