"""The demo SECOND: its configuration, its training, its checkpoint and how good that is."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve.errors import CheckpointError, SettingsError
from serve.synthetic.layout import CLASSES
from serve.synthetic.scenes import generate_scene, points_in_boxes, sample_scene
from tools.demo import training
from tools.demo.evaluation import detect, evaluate, load_model, truth_of
from tools.demo.training import CHECKPOINT, CONFIG, TrainingOptions, augment, one_cycle, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def native() -> Any:
    return load_model()


@pytest.fixture
def quiet_openmmlab() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_the_config_is_self_contained_and_built_of_seconds_blocks() -> None:
    from mmengine.config import Config

    model = Config.fromfile(str(CONFIG)).model
    types = [model.type, model.data_preprocessor.type, model.voxel_encoder.type, model.middle_encoder.type]
    types += [model.backbone.type, model.neck.type, model.bbox_head.type]
    assert types == [
        "VoxelNet",
        "Det3DDataPreprocessor",
        "HardSimpleVFE",
        "SparseEncoder",
        "SECOND",
        "SECONDFPN",
        "Anchor3DHead",
    ]
    assert "_base_" not in CONFIG.read_text().split('"""', 2)[2]


def test_the_checkpoint_is_small_and_holds_plain_float32_weights_only() -> None:
    assert CHECKPOINT.stat().st_size <= 3_000_000
    document = torch.load(CHECKPOINT, weights_only=True)
    assert set(document) == {"state_dict", "meta"}
    kinds = {value.dtype for value in document["state_dict"].values()}
    assert kinds == {torch.float32, torch.int64}  # int64: BN's step counters
    assert all(bool(torch.isfinite(value).all()) for value in document["state_dict"].values())
    assert document["meta"]["dataset_meta"]["classes"] == list(CLASSES)
    json.dumps(document["meta"])


def test_the_checkpoint_fits_the_config_exactly(native: Any) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    assert set(state) == set(native.state_dict())
    assert tuple(native.dataset_meta["classes"]) == CLASSES


def test_mmdet3ds_own_api_detects_from_a_bin_file(native: Any, tmp_path: Path, quiet_openmmlab: None) -> None:
    from mmdet3d.apis import inference_detector

    sample = sample_scene()
    path = tmp_path / "sample.bin"
    path.write_bytes(sample.to_bytes())
    result, _ = inference_detector(native, str(path))
    found, from_array = result.pred_instances_3d, detect(native, sample)
    assert np.allclose(found.bboxes_3d.tensor.numpy(), from_array.boxes, atol=1e-6)
    assert len(found.scores_3d) > 0


def test_the_sample_frames_objects_are_found(native: Any) -> None:
    """Of every class at least one confident detection stands on a true box of it."""
    sample = sample_scene()
    found = detect(native, sample)
    for label, reach in ((0, 0.5), (1, 0.7), (2, 1.0)):
        sure = found.boxes[(found.labels == label) & (found.scores > 0.4)]
        true = sample.boxes[sample.labels == label]
        gap = np.hypot(sure[:, None, 0] - true[None, :, 0], sure[:, None, 1] - true[None, :, 1])
        assert len(sure) and (gap < reach).any()


@pytest.mark.slow
def test_held_out_average_precision_is_above_a_floor() -> None:
    """A few frames only, so the floors are far under the figures of the full run in docs/demo-model.md."""
    result = evaluate(frames=6)
    ap = json.loads(result.json_line())["ap_bev_r40"]
    assert ap["Car"]["0.5"] >= 0.8
    assert ap["Cyclist"]["0.25"] >= 0.6
    assert ap["Pedestrian"]["0.25"] >= 0.7
    assert result.first_seed == 1_000_000
    assert "Car" in result.table()


def test_missing_checkpoint_error_names_the_training_command(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tools\.demo train"):
        load_model(checkpoint=tmp_path / "none.pth")


def test_augmentation_keeps_points_in_their_boxes() -> None:
    rng = np.random.default_rng(0)
    for seed in range(4):
        scene = generate_scene(seed)
        points, boxes, labels = augment(scene, rng)
        enough = scene.points_in_box >= 5
        assert len(points) == len(scene.points) and np.array_equal(labels, scene.labels[enough])
        counts = points_in_boxes(points, boxes).sum(axis=0)
        assert np.abs(counts - scene.points_in_box[enough]).max() <= 2  # borders round


def test_one_cycle_rises_then_falls() -> None:
    rates = [one_cycle(i / 100, 1.0) for i in range(101)]
    peak = int(np.argmax(rates))
    assert (
        rates[0] == pytest.approx(0.1)
        and max(rates) == pytest.approx(1.0)
        and rates[-1] == pytest.approx(0.001)
    )
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
    assert one_cycle(2.0, 1.0) == rates[-1]


@pytest.mark.slow
def test_training_twice_gives_the_same_weights(tmp_path: Path, quiet_openmmlab: None) -> None:
    options = TrainingOptions(frames=2, epochs=1, batch_size=1, seed=3)
    first, second = (train(options, tmp_path / name) for name in ("a.pth", "b.pth"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth"]
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (first, second)]
    assert all(torch.allclose(value, states[1][key], atol=1e-4) for key, value in states[0].items())


def test_interrupted_training_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_openmmlab: None
) -> None:
    out = tmp_path / "kept.pth"
    out.write_bytes(b"old")

    def interrupt(seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "generate_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(TrainingOptions(frames=2, epochs=1), out)
    assert out.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["kept.pth"]


def test_interrupt_while_saving_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: Any
) -> None:
    out = tmp_path / "kept.pth"
    out.write_bytes(b"old")

    def interrupt(document: object, stream: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.save_checkpoint(native, out, {})
    assert out.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["kept.pth"]


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 0}, {"epochs": 0}, {"seed": -1}, {"learning_rate": 0.0}, {"frames": 10_001}, {"seed": 100}],
)
def test_impossible_training_options_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        TrainingOptions(**wrong)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_wrong_option_returns_2_and_is_named(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo", command, "--frames", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--frames" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_ignored_boxes_are_those_out_of_range_or_hardly_hit() -> None:
    scene = generate_scene(0)
    limits = (0.0, -32.0, -3.0, 51.2, 32.0, 1.0)
    truth = truth_of(scene, limits, 20)
    for row, ignored in enumerate(truth.ignored):
        x, y = scene.boxes[row, :2]
        inside = 0 <= x <= 51.2 and abs(y) <= 32
        assert ignored == (not inside or scene.points_in_box[row] < 20)
