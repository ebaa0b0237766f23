"""``mmdet3d-serve check-device``: what it measures, and that it notices a device with other answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from serve import archive, ops

ops.install("portable")

from serve.cli import check_device  # noqa: E402
from serve.runtime import load_detector  # noqa: E402
from serve.runtime.accelerator.stand_in import DEVICE, stand_in_device  # noqa: E402
from serve.runtime.pipeline import frame_spec  # noqa: E402
from serve.verify import device_check  # noqa: E402


@pytest.mark.slow
def test_check_of_the_cpu_finds_equal_answers_and_counts_operators(
    demo_mar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_device.main([str(demo_mar), "--device", "cpu"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    (found,) = json.loads(line)["models"]
    assert found["equal"] and found["repeats"] and found["batch_equal"] and found["detections"] > 0
    assert found["operators"] > 100 and found["synchronisations"] <= 3
    assert found["alone_ms"] > 0 and found["self_test_s"] > 0 and found["stages_ms"]["encode"] > 0


@pytest.mark.slow
def test_device_with_other_answers_is_not_equal(
    demo_mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = archive.extract(demo_mar, tmp_path / "opened")
    loaded = []

    def load(*args, **more):
        detector = load_detector(*args, **more)
        loaded.append(detector)
        if len(loaded) == 2:  # the first one is that of the CPU
            run = detector.run
            detector.run = lambda frames: [
                {**one, "bboxes_3d": one["bboxes_3d"] + np.float32(0.1)} for one in run(frames)
            ]
        return detector

    monkeypatch.setattr(device_check, "load_detector", load)
    found = device_check.check_model(opened, tmp_path / "opened", torch.device("cpu"), measure=False)
    assert found.equal is False and not found.ok


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_frame_is_compared_and_measured_with_graphs_too(demo_mar: Path, tmp_path: Path) -> None:
    opened = archive.extract(demo_mar, tmp_path / "opened")
    body = device_check._frames(frame_spec(opened.config()))[0]
    expected = device_check._answers(load_detector(opened, torch.device("cpu")), [body])[0]
    found = device_check.ModelCheck("demo")
    with stand_in_device():
        there = load_detector(opened, DEVICE)
        device_check._measure_ways(found, opened, there, DEVICE, body, expected)
        assert found.graphs_equal and found.graphs_ms and found.graphs_refused is None and found.ok
        wrong = {**expected, "bboxes_3d": expected["bboxes_3d"] + np.float32(0.1)}
        device_check._measure_ways(found, opened, there, DEVICE, body, wrong)
        assert found.graphs_equal is False and not found.ok


def test_model_that_cannot_run_is_reported_and_the_next_one_checked(tmp_path: Path) -> None:
    class Broken:
        class metadata:
            name = "broken"

        def config(self) -> None:
            raise ValueError("no config")

    found = device_check.check_model(Broken(), tmp_path, torch.device("cpu"))  # type: ignore[arg-type]
    assert found.error == "ValueError: no config" and not found.ok
    result = device_check.DeviceCheck("cpu", "", "", "", "", models=[found])
    assert "broken: ValueError: no config" in result.table()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_demo_model_on_a_cuda_device_is_equal_to_the_cpu(demo_mar: Path) -> None:
    assert check_device.main([str(demo_mar), "--device", "cuda:0"]) == 0
