"""CenterPoint of nuScenes with a key frame and nine sweeps answers what mmdet3d's own pipeline on files gives."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import tritonclient.http as triton

from handlers.mmdet3d_handler import MMDet3DHandler
from serve import archive, zoo
from serve.client import Client
from serve.compare.detections import Tolerances, compare_answers
from serve.convert import Conversion, configured_classes, convert, resolve_config
from serve.convert.random_weights import write_random_checkpoint
from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.verify.endpoint import find_frames, verify
from serve.verify.reference_loading import load_reference
from serve.verify.report import comparison_table
from tests.conftest import pick_free_ports
from tests.gateway.conftest import running_gateway
from tests.gateway.running import Background, eventually
from tests.worker.context import Context

MODEL = "centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d"
CLOSE = Tolerances(box_m=1e-3, yaw_rad=1e-3, score=1e-4)
# Random weights make boxes of a thousand metres, which another order of sums in a batch changes by decimetres.
BATCHED = Tolerances(box_m=1.0, yaw_rad=1e-3, score=1e-4)
NUMBER = 9
KEY_TIME_S = 1_538_984_233.547368


@pytest.fixture(scope="module")
def centerpoint(tmp_path_factory):
    """Config, checkpoint and conversion of the zoo's model with random weights."""
    folder = tmp_path_factory.mktemp("centerpoint")
    config = zoo.resolve(MODEL).config_path
    resolved = resolve_config(config).config
    checkpoint = folder / "random.pth"
    write_random_checkpoint(resolved, tuple(configured_classes(resolved)), checkpoint)
    return (
        config,
        checkpoint,
        convert(
            Conversion(config, checkpoint, folder, "centerpoint", fold_batch_norm=False, channels_last=False)
        ),
        folder,
    )


def scene(street: np.ndarray, k: int) -> np.ndarray:
    """(N, 5) float32: the street as a vehicle sees it that has driven k half metres less."""
    points = np.zeros((len(street), 5), np.float32)
    points[:, :4] = street
    points[:, 4] = np.arange(len(street)) % 32
    points[:, 0] += 0.5 * k
    points[:, :3] += np.random.default_rng(k).normal(0, 0.02, (len(street), 3)).astype(np.float32)
    return points


def lidar2sensor(k: int) -> list[list[float]]:
    cosine, sine = np.cos(0.01 * k), np.sin(0.01 * k)
    return [[cosine, sine, 0, 0.5 * k], [-sine, cosine, 0, 0.02 * k], [0, 0, 1, 0], [0, 0, 0, 1]]


def native(config: Path, checkpoint: Path, folder: Path, street: np.ndarray, count: int) -> dict[str, Any]:
    """Run mmdet3d's pipeline on files with the entries of nuScenes' infos, and its network."""
    import torch
    from mmdet3d.structures import get_box_type
    from mmengine.dataset import Compose, pseudo_collate
    from mmengine.registry import DefaultScope

    reference = load_reference(config, checkpoint, "cpu")
    for k in range(count + 1):
        scene(street, k).tofile(folder / f"{k}.bin")
    kind, mode = get_box_type("LiDAR")
    infos = {
        "lidar_points": {"lidar_path": str(folder / "0.bin")},
        "timestamp": KEY_TIME_S,
        "lidar_sweeps": [
            {
                "timestamp": KEY_TIME_S - 0.05 * k,
                "lidar_points": {"lidar_path": str(folder / f"{k}.bin"), "lidar2sensor": lidar2sensor(k)},
            }
            for k in range(1, count + 1)
        ],
        "box_type_3d": kind,
        "box_mode_3d": mode,
    }
    with torch.no_grad(), DefaultScope.overwrite_default_scope("mmdet3d"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mmdet3d's box coder, about a tensor made of a tensor
        sample = Compose(reference.module.cfg.test_dataloader.dataset.pipeline)(infos)
        (result,) = reference.module.test_step(pseudo_collate([sample]))
    return reference._read(result)


def parts(street: np.ndarray, count: int) -> dict[str, bytes]:
    poses = [
        {"timestamp_s": KEY_TIME_S - 0.05 * k, "lidar2sensor": lidar2sensor(k)} for k in range(1, count + 1)
    ]
    return {
        "points": scene(street, 0).tobytes(),
        **{f"sweep.{k - 1}": scene(street, k).tobytes() for k in range(1, count + 1)},
        "sweeps": json.dumps({"timestamp_s": KEY_TIME_S, "sweeps": poses}).encode(),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_centerpoint_with_ten_sweeps_equals_upstreams_pipeline(centerpoint, street, tmp_path):
    config, checkpoint, result, folder = centerpoint
    assert any("sweeps" in note for note in result.notes)
    opened = archive.extract(result.path, folder / "opened")
    handler = MMDet3DHandler()
    handler.initialize(Context(opened.root))
    body = parts(street, NUMBER)
    alone = body["points"]
    batch = pack_frames([(body, {}), (alone, {"load_dim": 5}), (parts(street, NUMBER + 3), {})])
    context = Context(opened.root, headers=[{"content-type": FRAMES_CONTENT_TYPE}])
    outcomes = orjson.loads(handler.handle([{"body": batch}], context)[0])["outcomes"]
    assert [outcome["status"] for outcome in outcomes] == [200, 200, 200], outcomes
    first, single, longer = (outcome["answer"] for outcome in outcomes)
    expected = native(config, checkpoint, tmp_path, street, NUMBER)
    (by_itself,) = handler.handle([body], Context(opened.root))
    found = compare_answers(expected, orjson.loads(by_itself), CLOSE)
    assert found.expected_count > 0 and found.ok, comparison_table(found)
    assert compare_answers(expected, first, BATCHED).ok
    assert compare_answers(first, longer, BATCHED).ok  # its three earliest sweeps are not used
    assert not compare_answers(first, single, BATCHED).ok  # the sweeps matter
    # The random weights were scaled on intensities of 0 to 1, which nuScenes does not have.
    codes = [[warning["code"] for warning in answer["warnings"]] for answer in (first, single, longer)]
    assert codes == [
        ["intensity_scale"],
        ["intensity_scale", "one_sweep"],
        ["intensity_scale", "sweeps_ignored"],
    ]
    described = handler.describe()
    assert described["sweeps"]["number"] == NUMBER and described["warnings"][0]["code"] == "one_sweep"


@pytest.mark.slow
@pytest.mark.torchserve
@pytest.mark.timeout(900)
def test_sweeps_over_http_v2_and_the_client_are_answered_alike(centerpoint, street, tmp_path):
    config, checkpoint, _, folder = centerpoint
    body = parts(street, NUMBER)
    accumulated = scene(street, 0)
    accumulated[:, 4] = np.linspace(0, 0.45, len(accumulated))
    frame = tmp_path / "frames" / "one"
    frame.mkdir(parents=True)
    for name, data in body.items():
        (frame / f"{name}.{'json' if name == 'sweeps' else 'bin'}").write_bytes(data)
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    options = TorchServeOptions(
        model_store=folder, models=[ServedModel("centerpoint.mar")], system_metrics=False, gpus=0, **ports
    )
    background = Background()
    try:
        with TorchServe(options) as server, Client(f"127.0.0.1:{ports['inference_port']}") as direct:
            urls = {"inference_url": server.inference_url, "management_url": server.management_url}
            with running_gateway(background, **urls, worker_sockets=server.worker_sockets) as gateway:
                eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
                with Client(gateway.url) as through:
                    served = direct.predict(body, "centerpoint")
                    assert served["names"]
                    # The tool sends the same folder and runs mmdet3d's own pipeline on it.
                    reference = load_reference(config, checkpoint, "cpu")
                    for frames in (find_frames(frame, "lidar"), find_frames(frame.parent, "lidar")):
                        (report,) = verify(frames, reference, through, "centerpoint", score_thr=0.0)
                        assert report.comparison.ok, comparison_table(report.comparison)
                        assert report.served["scores_3d"] == served["scores_3d"]
                    assert through.predict(body, "centerpoint") == served
                    kept = direct.predict(accumulated.tobytes(), "centerpoint", sweeps="accumulated")
                    assert "one_sweep" not in [warning["code"] for warning in kept["warnings"]]
                    assert through.predict(accumulated.tobytes(), "centerpoint", sweeps="accumulated") == kept
                    alone = through.predict(accumulated.tobytes(), "centerpoint")
                    assert kept["scores_3d"] != alone["scores_3d"] != served["scores_3d"]
                assert infer(gateway.url.removeprefix("http://"), body) == served
                (shown,) = gateway.client.get("/models").json()
                assert shown["sweeps"]["number"] == NUMBER and shown["warnings"][0]["code"] == "one_sweep"
    finally:
        background.stop()


def infer(address: str, body: dict[str, bytes]) -> dict[str, Any]:
    """Send a frame over the Open Inference Protocol; return its answer."""
    inputs = []
    for name, data in body.items():
        if name == "sweeps":
            made = triton.InferInput(name, [1], "BYTES")
            made.set_data_from_numpy(np.array([data], dtype=object))
        else:
            points = np.frombuffer(data, np.float32).reshape(-1, 5)
            made = triton.InferInput(name, list(points.shape), "FP32")
            made.set_data_from_numpy(points)
        inputs.append(made)
    with triton.InferenceServerClient(address, network_timeout=120) as client:
        answer: dict[str, Any] = json.loads(client.infer("centerpoint", inputs).as_numpy("detections")[0])
    return answer
