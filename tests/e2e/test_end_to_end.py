"""The whole path over a real TorchServe, for four models: what is served equals what mmdet and mmdet3d detect."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import httpx
import numpy as np
import psutil
import pytest
import torch

from serve import convert, zoo
from serve.cli import run, verify
from serve.convert import Conversion, configured_classes, resolve_config
from serve.convert.golden import golden_image
from serve.convert.random_weights import write_random_checkpoint
from serve.errors import BackendStartError
from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from tests.conftest import DEMO_CHECKPOINT, DEMO_CONFIG, pick_free_ports
from tests.e2e.small_models import smaller_pictures

pytestmark = [pytest.mark.torchserve, pytest.mark.timeout(600)]

TOOL = Path(__file__).parents[2] / "tools" / "deployment" / "test_torchserver.py"
# Random weights that behave (serve.convert.random_weights); pictures below the zoo's size, for the clock's sake, and of
# sizes that need no padding: on constant regions a random network's candidates tie, and rounding decides between them.
RANDOM = ("pointpillars", "faster-rcnn", "mask-rcnn", "retinanet")


@pytest.fixture(scope="module")
def models(tmp_path_factory, store, demo_mar) -> dict[str, tuple[Path, Path]]:
    """Name → (config, checkpoint); archives of all of them lie in the store."""
    folder = tmp_path_factory.mktemp("models")
    made = {"second": (DEMO_CONFIG, DEMO_CHECKPOINT)}
    for name in RANDOM:
        of_points = name == "pointpillars"
        config = zoo.resolve(name).config_path if of_points else smaller_pictures(name, folder)
        checkpoint = folder / f"{name}.pth"
        resolved = resolve_config(config).config
        write_random_checkpoint(resolved, tuple(configured_classes(resolved)), checkpoint)
        convert.convert(Conversion(config, checkpoint, store, name))
        made[name] = (config, checkpoint)
    return made


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> dict[str, Path]:
    """A folder of clouds and one of pictures; one of either has next to nothing in it."""
    from serve.synthetic.scenes import generate_scene, held_out_seed

    clouds, pictures = tmp_path_factory.mktemp("clouds"), tmp_path_factory.mktemp("pictures")
    for i in range(2):
        (clouds / f"{i}.bin").write_bytes(generate_scene(held_out_seed(i)).to_bytes())
    np.array([[200, 0, 0, 0]], dtype=np.float32).tofile(clouds / "nothing.bin")
    cv2.imwrite(str(pictures / "street.jpg"), golden_image(320, 192, seed=1))
    cv2.imwrite(str(pictures / "upright.png"), golden_image(192, 320, seed=2))
    return {"lidar": clouds, "image": pictures}


@pytest.fixture(scope="module")
def server(models, store) -> Iterator[TorchServe]:
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    options = TorchServeOptions(
        model_store=store, models=[ServedModel(f"{name}.mar") for name in models], **ports
    )
    with TorchServe(options) as running:
        yield running


@pytest.fixture(scope="module")
def address(server) -> str:
    return f"127.0.0.1:{server.options.inference_port}"


@pytest.fixture
def run_tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The proof tool in this process, which has imported what it needs; the first test starts the program itself."""

    def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = run(verify.main, list(map(str, arguments)))
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return tool


def run_program(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize("name", ["second", *RANDOM])
def test_served_model_equals_native_pytorch(name, models, frames, address, run_tool):
    config, checkpoint = models[name]
    prove = run_program if name == "second" else run_tool
    folder = frames["lidar" if name in ("second", "pointpillars") else "image"]
    # Two-stage detectors with random weights score low: compare what there is.
    done = prove(
        folder, config, checkpoint, name, "--inference-addr", address, "--device", "cpu", "--score-thr", 0.1
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = [
        int(word)
        for line in done.stdout.splitlines()
        if "pairs" in line
        for word in line.split()
        if word.isdigit()
    ]
    assert max(counted, default=0) > 0, "nothing was compared"


def test_altered_weight_is_detected_by_verify(models, frames, store, server, address, run_tool, tmp_path):
    checkpoint = torch.load(DEMO_CHECKPOINT, weights_only=True)
    checkpoint["state_dict"]["bbox_head.conv_reg.bias"][2] += 0.01
    torch.save(checkpoint, tmp_path / "altered.pth")
    convert.convert(Conversion(DEMO_CONFIG, tmp_path / "altered.pth", store, "altered"))
    server.register(ServedModel("altered.mar"))
    done = run_tool(
        frames["lidar"],
        DEMO_CONFIG,
        DEMO_CHECKPOINT,
        "altered",
        "--inference-addr",
        address,
        "--device",
        "cpu",
    )
    server.unregister("altered")
    assert done.returncode == 1, done.stdout + done.stderr


def test_verify_reports_wrong_and_missing_models(models, frames, address, run_tool):
    config, checkpoint = models["second"]
    for name in ("faster-rcnn", "nobody"):
        done = run_tool(
            frames["lidar"], config, checkpoint, name, "--inference-addr", address, "--device", "cpu"
        )
        assert done.returncode == 2 and "error:" in done.stderr, done.stdout + done.stderr


def test_bad_input_gets_a_4xx_and_the_worker_survives(address, server, street):
    before = [worker.pid for worker in server.workers("second")]
    url = f"http://{address}/predictions/second"
    bad = street.copy()
    bad[0, 0] = np.nan
    mistakes = [
        ({"content": street.tobytes()[:-3]}, 422),
        ({"content": np.zeros((11, 5), np.float32).tobytes()}, 422),
        ({"content": np.zeros((12, 5), np.float32).tobytes(), "headers": {"X-Load-Dim": "5"}}, 422),
        ({"content": bad.tobytes()}, 422),
        ({"content": b""}, 422),
        ({"content": b"just some text"}, 422),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"x", "headers": {"X-Score-Thr": "lots"}}, 400),
        ({"content": b"--nonsense", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400),
        ({"files": {"data": street.tobytes()}, "data": {"colour": "red"}}, 400),
        ({"content": b"abc", "headers": {"content-type": FRAMES_CONTENT_TYPE}}, 400),
    ]
    for request, status in mistakes:
        answer = httpx.post(url, timeout=60, **request)
        assert answer.status_code == status, (request, answer.text)
        assert answer.headers["content-type"] == "application/json"
        assert set(answer.json()["error"]) == {"code", "message", "request_id"}
    good = httpx.post(url, content=street.tobytes(), timeout=60)
    assert good.status_code == 200 and good.json()["names"]
    assert [worker.pid for worker in server.workers("second")] == before
    assert all(psutil.pid_exists(pid) for pid in before)


@pytest.mark.parametrize("kept", [0.5, 0.98])
def test_truncated_image_is_rejected_over_http(address, kept):
    body = cv2.imencode(".jpg", golden_image())[1].tobytes()
    answer = httpx.post(
        f"http://{address}/predictions/faster-rcnn", content=body[: int(kept * len(body))], timeout=60
    )
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "undecodable_frame"


def test_framed_batch_is_answered_in_one_call(address, street):
    body = pack_frames([(street.tobytes(), {"max_detections": 2}), (b"junk", {}), (street.tobytes(), {})])
    answer = httpx.post(
        f"http://{address}/predictions/second",
        content=body,
        headers={"content-type": FRAMES_CONTENT_TYPE},
        timeout=60,
    )
    outcomes = answer.json()["outcomes"]
    assert [outcome["status"] for outcome in outcomes] == [200, 422, 200]
    assert outcomes[0]["answer"]["bboxes_3d"] == outcomes[2]["answer"]["bboxes_3d"][:2]


def test_archive_altered_after_conversion_is_not_served(demo_mar, tmp_path):
    # A whole zip again, with one bit of the weights changed: only the recorded hash can tell.
    with zipfile.ZipFile(demo_mar) as sound, zipfile.ZipFile(tmp_path / "second.mar", "w") as altered:
        for name in sound.namelist():
            data = bytearray(sound.read(name))
            if name == "weights.safetensors":
                data[-5] ^= 1
            altered.writestr(name, bytes(data))
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    options = TorchServeOptions(model_store=tmp_path, models=[ServedModel("second.mar")], **ports)
    with pytest.raises(BackendStartError, match=r"second did not load: weights\.safetensors was altered"):
        TorchServe(options).start()


def test_serve_command_rejects_a_corrupt_archive(demo_mar, tmp_path):
    data = bytearray(demo_mar.read_bytes())
    data[data.find(b"weights.safetensors") + 100_000] ^= 1
    (tmp_path / "second.mar").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "serve", "serve", "--store", tmp_path, "--state-dir", tmp_path / "state"],
        cwd=TOOL.parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2 and "second.mar cannot be read" in done.stderr, done.stderr
