"""Figures on data sets that come as tables, nuScenes and Lyft, are upstream's own of the same predictions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from serve.cli.main import main
from serve.evaluate.data_set import data_settings, open_data_set, upstream_session
from serve.evaluate.frames import read_frames
from serve.protocol.sweeps import parse_sweeps
from serve.synthetic.releases import LYFT, NUSCENES
from tests.conftest import ASSETS
from tests.evaluate import made_predictions
from tests.evaluate.answering import answering
from tests.evaluate.test_evaluation import upstream_figures

nuscenes_kit = pytest.importorskip(
    "nuscenes", reason="nuScenes' development kit comes with `make setup-train`"
)
pytest.importorskip("lyft_dataset_sdk", reason="Lyft's development kit comes with `make setup-train`")
pytestmark = pytest.mark.slow
RELEASES = {"nuscenes": NUSCENES, "lyft": LYFT}


def made(folder: Path, name: str) -> tuple[Path, made_predictions.Predictions]:
    predictions = made_predictions.drives(folder, RELEASES[name])
    for file in ("second_demo.py", f"{name}_sample.py"):
        (folder / file).write_bytes((ASSETS / file).read_bytes())
    return folder / f"{name}_sample.py", predictions


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory):
    return made(tmp_path_factory.mktemp("nuscenes") / "data", "nuscenes")


@pytest.fixture(scope="module")
def lyft(tmp_path_factory):
    return made(tmp_path_factory.mktemp("lyft") / "data", "lyft")


def evaluated(config: Path, address: str, capsys, *options: str) -> dict:
    assert main(["evaluate", str(config), "--url", address, "--model", "made", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_nuscenes_figures_are_upstreams(nuscenes, capsys):
    config, predictions = nuscenes
    with answering(predictions.answers) as address:
        found = evaluated(config, address, capsys)
    expected = upstream_figures(config, predictions.samples)
    figures = found["figures"]
    names = {"mAP": "mAP", "NDS": "NDS", "mATE": "translation error cm", "mAVE": "velocity error cm/s"}
    for upstreams, ours in names.items():
        value = expected[f"NuScenes metric/pred_instances_3d_NuScenes/{upstreams}"]
        assert figures["all"][ours]["served"] == pytest.approx(100 * value, abs=1e-3)
    for name in made_predictions.DRIVE_CLASSES:
        value = expected[f"NuScenes metric/pred_instances_3d_NuScenes/{name}_AP_dist_2.0"]
        assert figures[name]["AP 2.0 m"]["served"] == pytest.approx(100 * value, abs=1e-3)
    assert 5 < figures["car"]["AP 2.0 m"]["served"] < 95
    # Velocities are those of the objects: most errors are the noise of the predictions.
    assert figures["car"]["velocity error cm/s"]["served"] < 50


def test_lyft_figures_are_upstreams(lyft, capsys):
    config, predictions = lyft
    with answering(predictions.answers) as address:
        found = evaluated(config, address, capsys)
    expected = upstream_figures(config, predictions.samples)
    assert len(expected) == 4
    for key, value in expected.items():
        label = key.rpartition("/")[2].removesuffix("_AP")
        label = "all" if label == "mAP" else label
        assert found["figures"][label]["mAP"]["served"] == pytest.approx(100 * value, abs=1e-3)
    assert 5 < found["figures"]["car"]["mAP"]["served"] < 95


@pytest.mark.parametrize("name", ["nuscenes", "lyft"])
def test_a_limit_leaves_the_frames_out_that_were_not_predicted(name, request, capsys):
    config, predictions = request.getfixturevalue(name)
    with answering(predictions.answers) as address:
        limited = evaluated(config, address, capsys, "--limit", "2")
        whole = evaluated(config, address, capsys)
    assert (limited["frames"], whole["frames"]) == (2, made_predictions.FRAMES)
    first, last = (found["figures"]["car"] for found in (limited, whole))
    kind = "AP 4.0 m" if name == "nuscenes" else "mAP"
    # Without the limit on the truth, the frames that are missing would be missed.
    assert first[kind]["served"] > last[kind]["served"] / 2
    assert first != last


def test_a_frame_carries_the_latest_sweeps_with_their_times(nuscenes):
    config, _ = nuscenes
    data = open_data_set(data_settings(config), 2)
    with upstream_session("mmdet3d"):
        _, frame = read_frames(data)
    assert len(data.dataset.get_data_info(1)["lidar_sweeps"]) > 2
    assert set(frame.parts) == {"points", "sweeps", "sweep.0", "sweep.1"}
    entry = data.dataset.get_data_info(1)["lidar_sweeps"]
    poses = parse_sweeps(frame.parts["sweeps"])
    assert [pose.time_lag_s for pose in poses] == pytest.approx([1 / 6, 2 / 6], abs=1e-5)
    assert frame.parts["sweep.1"] == Path(entry[1]["lidar_points"]["lidar_path"]).read_bytes()


def test_boxes_without_velocities_are_refused(nuscenes, capsys):
    config, predictions = nuscenes
    answers = copy.deepcopy(predictions.answers)
    for answer in answers.values():
        answer["bboxes_3d"] = [box[:7] for box in answer["bboxes_3d"]]
    with answering(answers) as address:
        assert main(["evaluate", str(config), "--url", address, "--model", "made"]) == 2
    assert "velocities" in capsys.readouterr().err


def test_the_attributes_that_answers_of_images_lack_are_named(nuscenes, capsys):
    config, _ = nuscenes
    options = ["--cfg-options", "test_dataloader.dataset.box_type_3d=Camera"]
    assert main(["evaluate", str(config), "--model", "made", *options]) == 2
    assert "attributes" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "folder"), [("nuscenes", "v1.0-mini"), ("lyft", "v1.01-train")])
def test_missing_tables_are_named_before_anything_runs(name, folder, request, capsys):
    config, _ = request.getfixturevalue(name)
    options = ["--cfg-options", "test_evaluator.data_root=no/such"]
    if name == "lyft":
        options.append(f"test_evaluator.ann_file={config.parent / 'lyft_infos_val.pkl'}")
    assert main(["evaluate", str(config), "--model", "made", *options]) == 2
    assert f"no/such/{folder}" in capsys.readouterr().err


def test_the_annotation_files_are_those_of_upstreams_converter(nuscenes, tmp_path, monkeypatch):
    import pickle
    import shutil

    import numpy as np

    from serve.upstream import tools

    folder = shutil.copytree(nuscenes[0].parent, tmp_path / "data" / "nuscenes")
    ours = {
        split: pickle.loads((folder / f"nuscenes_infos_{split}.pkl").read_bytes())
        for split in ("train", "val")
    }
    monkeypatch.chdir(tmp_path)
    arguments = ["--root-path", "data/nuscenes", "--out-dir", "data/nuscenes", "--extra-tag", "nuscenes"]
    assert tools.run("create_data", ["nuscenes", *arguments, "--version", "v1.0-mini"]) == 0
    for split, mine in ours.items():
        theirs = pickle.loads((folder / f"nuscenes_infos_{split}.pkl").read_bytes())
        assert theirs["metainfo"]["version"] == mine["metainfo"]["version"]
        for one, other in zip(mine["data_list"], theirs["data_list"], strict=True):
            assert (one["token"], one["timestamp"]) == (other["token"], other["timestamp"])
            for name in ("lidar2ego", "lidar_path"):
                a, b = one["lidar_points"][name], other["lidar_points"][name]
                assert a == b if name == "lidar_path" else np.allclose(a, b)
            assert np.allclose(one["ego2global"], other["ego2global"])
            assert len(one["lidar_sweeps"]) == len(other["lidar_sweeps"])
            boxes = [np.array([each["bbox_3d"] for each in entry["instances"]]) for entry in (one, other)]
            assert np.allclose(*boxes, atol=1e-3)
            for name in ("bbox_label_3d", "num_lidar_pts", "bbox_3d_isvalid"):
                assert [each[name] for each in one["instances"]] == [
                    each[name] for each in other["instances"]
                ]
            speeds = [np.array([each["velocity"] for each in entry["instances"]]) for entry in (one, other)]
            known = np.isfinite(speeds[1])  # not of a scene with one key frame
            assert np.allclose(speeds[0][known], speeds[1][known], atol=0.05)
            cameras = [entry["images"]["CAM_FRONT"] for entry in (one, other)]
            for name in ("cam2img", "cam2ego", "lidar2cam"):
                assert np.allclose(cameras[0][name], cameras[1][name], atol=1e-3), name
