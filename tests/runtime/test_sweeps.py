"""Sweeps: the served pipeline builds the points of mmdet3d's own multi-sweep pipeline on files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve.convert.golden import read_frame
from serve.errors import ArchiveError, BadRequest, FrameTooLarge
from serve.protocol.frames import Frame, decode_frame
from serve.protocol.json_bodies import decode_json_request
from serve.protocol.options import FrameOptions
from serve.protocol.sweeps import ACCUMULATED, SweepSpec
from serve.runtime.pipeline import InputPipeline, frame_spec
from serve.settings import Limits

LIMITS = Limits()


def config(**step: Any) -> dict[str, Any]:
    """Build a config with the loading steps of nuScenes; `step` changes the one of the sweeps."""
    return {
        "default_scope": "mmdet3d",
        "model": {
            "data_preprocessor": {
                "type": "Det3DDataPreprocessor",
                "voxel_layer": {"point_cloud_range": [-50, -50, -5, 50, 50, 3]},
            }
        },
        "test_dataloader": {
            "dataset": {
                "type": "NuScenesDataset",
                "box_type_3d": "LiDAR",
                "pipeline": [
                    {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": 5, "use_dim": 5},
                    {"type": "LoadPointsFromMultiSweeps", "sweeps_num": 10, "test_mode": True, **step},
                    {"type": "Pack3DDetInputs", "keys": ["points"]},
                ],
            }
        },
    }


def cloud(seed: int, count: int = 700) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points = rng.uniform((-50, -50, -4, 0, 0), (50, 50, 2, 255, 31), (count, 5)).astype(np.float32)
    points[:, 4] = np.floor(points[:, 4])
    return points


def lidar2sensor(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.eye(3) + 0.05 * rng.normal(size=(3, 3)))[0]
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.sign(np.diag(rotation))
    matrix[:3, 3] = rng.normal(size=3)
    return matrix


def upstream_points(folder: Path, step: dict[str, Any], lags: list[float], now: float) -> torch.Tensor:
    """Run mmdet3d's own steps on files, with the entries of an infos file."""
    from mmdet3d.datasets.transforms import LoadPointsFromFile, LoadPointsFromMultiSweeps

    for k in range(len(lags) + 1):
        cloud(k).tofile(folder / f"{k}.bin")
    results: dict[str, Any] = {"lidar_points": {"lidar_path": str(folder / "0.bin")}, "timestamp": now}
    if lags:
        results["lidar_sweeps"] = [
            {
                "timestamp": now - lag,
                "lidar_points": {
                    "lidar_path": str(folder / f"{k}.bin"),
                    "lidar2sensor": lidar2sensor(k).tolist(),
                },
            }
            for k, lag in enumerate(lags, 1)
        ]
    results = LoadPointsFromFile("LIDAR", load_dim=5, use_dim=5)(results)
    return LoadPointsFromMultiSweeps(**{"sweeps_num": 10, "test_mode": True, **step})(results)[
        "points"
    ].tensor


def parts(lags: list[float], now: float) -> dict[str, bytes]:
    poses = [
        {"timestamp_s": now - lag, "lidar2sensor": lidar2sensor(k).tolist()} for k, lag in enumerate(lags, 1)
    ]
    return {
        "points": cloud(0).tobytes(),
        **{f"sweep.{k}": cloud(k + 1).tobytes() for k in range(len(lags))},
        "sweeps": json.dumps({"timestamp_s": now, "sweeps": poses}).encode(),
    }


def served_points(body: Any, step: dict[str, Any] | None = None, **options: Any) -> torch.Tensor:
    built = config(**(step or {}))
    frame = decode_frame(body, frame_spec(built), FrameOptions(load_dim=5, **options), LIMITS)
    return InputPipeline(built).build(frame)["inputs"]["points"]


@pytest.mark.parametrize("count", [1, 3, 10])
@pytest.mark.parametrize(
    "step",
    [
        {},
        {"sweeps_num": 10, "use_dim": [0, 1, 2, 3, 4], "pad_empty_sweeps": True, "remove_close": True},
        {"use_dim": 4},
    ],
)
def test_sweeps_give_the_points_of_upstreams_files_bit_for_bit(tmp_path, count, step):
    lags, now = [0.05 * (k + 1) for k in range(count)], 1_538_984_233.547
    expected = upstream_points(tmp_path, step, lags, now)
    assert torch.equal(served_points(parts(lags, now), step), expected)


def test_sweeps_of_a_random_choice_are_the_latest_every_time(tmp_path):
    lags, now = [0.05 * (k + 1) for k in range(12)], 1_538_984_233.547
    expected = upstream_points(tmp_path, {"sweeps_num": 9}, lags, now)
    for _ in range(3):
        served = served_points(parts(lags, now), {"sweeps_num": 9, "test_mode": False})
        assert torch.equal(served, expected)


def test_sweeps_out_of_order_are_chosen_by_their_time():
    lags = [0.5, 0.05, 0.4, 0.1]
    times = served_points(parts(lags, 100.0), {"sweeps_num": 2})[:, 3].unique().tolist()
    assert times == pytest.approx([0, 0.05, 0.1], abs=1e-6)


def test_key_frame_alone_is_served_as_upstream_does_with_a_warning(tmp_path):
    step = {"sweeps_num": 9, "pad_empty_sweeps": True, "remove_close": True}
    expected = upstream_points(tmp_path, step, [], 1.0)
    built = config(**step)
    frame = decode_frame(cloud(0).tobytes(), frame_spec(built), FrameOptions(load_dim=5), LIMITS)
    assert torch.equal(InputPipeline(built).build(frame)["inputs"]["points"], expected)
    assert [warning.code for warning in frame.warnings] == ["one_sweep"]


def test_accumulated_cloud_keeps_its_times_and_is_not_repeated():
    points = cloud(0)
    points[:, 4] = np.linspace(0, 0.5, len(points))
    step = {"sweeps_num": 9, "pad_empty_sweeps": True, "remove_close": True}
    served = served_points(points.tobytes(), step, sweeps=ACCUMULATED)
    assert torch.equal(served, torch.from_numpy(points[:, [0, 1, 2, 4]]))
    built = config(**step)
    frame = decode_frame(
        points.tobytes(), frame_spec(built), FrameOptions(load_dim=5, sweeps=ACCUMULATED), LIMITS
    )
    assert frame.warnings == ()


def test_accumulated_time_is_the_column_that_the_loader_takes_as_fifth():
    built = config(use_dim=[0, 1, 2, 4])
    loader = built["test_dataloader"]["dataset"]["pipeline"][0]
    loader.update(load_dim=6, use_dim=[0, 1, 2, 3, 5])
    spec = frame_spec(built)
    assert spec.sweeps is not None and spec.sweeps.time_column == 5 and spec.used_columns == (0, 1, 2, 3)
    points = np.hstack([cloud(0), np.full((700, 1), 0.25, np.float32)])
    frame = decode_frame(points.tobytes(), spec, FrameOptions(load_dim=6, sweeps=ACCUMULATED), LIMITS)
    assert set(InputPipeline(built).build(frame)["inputs"]["points"][:, 3].tolist()) == {0.25}


def test_key_frame_without_a_column_for_the_time_is_refused_at_conversion():
    built = config()
    built["test_dataloader"]["dataset"]["pipeline"][0]["use_dim"] = 4
    with pytest.raises(ArchiveError, match="use_dim"):
        frame_spec(built)


def test_accumulated_cloud_with_named_columns_needs_the_time():
    points = cloud(0)
    options = FrameOptions(columns="x,y,z,time,intensity", sweeps=ACCUMULATED)
    frame = decode_frame(points.tobytes(), frame_spec(config()), options, LIMITS)
    assert np.array_equal(frame.points[:, 4], points[:, 3])  # type: ignore[index]
    with pytest.raises(Exception, match="time"):
        decode_frame(
            points.tobytes(),
            frame_spec(config()),
            FrameOptions(columns="x,y,z,ring,intensity", sweeps=ACCUMULATED),
            LIMITS,
        )


def test_transform_maps_a_point_of_the_sweep_to_the_key_frame():
    transform = np.eye(4)
    transform[:2, :2] = [[0, -1], [1, 0]]  # a quarter turn about z
    transform[:3, 3] = 10, 20, 1
    body = {
        "points": cloud(0, 1).tobytes(),
        "sweep.0": np.array([[1, 2, 0, 7, 3]], np.float32).tobytes(),
        "sweeps": json.dumps([{"time_lag_s": 0.25, "transform": transform.tolist()}]).encode(),
    }
    assert served_points(body)[1].tolist() == [8, 21, 1, 0.25]


def test_json_frame_of_sweeps_equals_its_parts():
    lags, now = [0.05, 0.1], 50.5
    body = parts(lags, now)
    listed = json.loads(body["sweeps"])["sweeps"]

    def b64(name):
        return {"b64": base64.b64encode(body[name]).decode()}

    document = {
        "points": b64("points"),
        "timestamp_s": now,
        "score_thr": 0.2,
        "sweeps": [{"points": b64(f"sweep.{k}"), **pose} for k, pose in enumerate(listed)],
    }
    frame, options = decode_json_request(json.dumps(document).encode())
    assert options == {"score_thr": 0.2}
    assert torch.equal(served_points(frame), served_points(body))


def test_points_of_key_frame_and_sweeps_together_are_limited():
    body = parts([0.05, 0.1], 1.0)
    with pytest.raises(FrameTooLarge, match="MMDET3D_SERVE_MAX_POINTS"):
        decode_frame(body, frame_spec(config()), FrameOptions(load_dim=5), Limits(max_points=2099))
    decode_frame(body, frame_spec(config()), FrameOptions(load_dim=5), Limits(max_points=2100))


@pytest.mark.parametrize("changed", ["missing_cloud", "missing_list", "extra_cloud", "accumulated"])
def test_frame_of_incomplete_sweeps_is_refused(changed):
    body, options = parts([0.05, 0.1], 1.0), FrameOptions(load_dim=5)
    match changed:
        case "missing_cloud":
            del body["sweep.1"]
        case "missing_list":
            del body["sweeps"]
        case "extra_cloud":
            body["sweep.2"] = body["sweep.1"]
        case "accumulated":
            options = FrameOptions(load_dim=5, sweeps=ACCUMULATED)
    with pytest.raises(BadRequest):
        decode_frame(body, frame_spec(config()), options, LIMITS)


def test_model_without_sweeps_refuses_them():
    built = config()
    pipeline = built["test_dataloader"]["dataset"]["pipeline"]
    del pipeline[1]
    for body, options in (
        (parts([0.05], 1.0), FrameOptions(load_dim=5)),
        (cloud(0).tobytes(), FrameOptions(load_dim=5, sweeps=ACCUMULATED)),
    ):
        with pytest.raises(BadRequest):
            decode_frame(body, frame_spec(built), options, LIMITS)


def test_sweeps_of_an_empty_key_frame_count_as_points():
    body = parts([0.05], 1.0)
    sweep = decode_frame(body, frame_spec(config()), FrameOptions(load_dim=5), LIMITS)
    assert not sweep.has_no_points
    assert Frame(np.zeros((0, 5), np.float32), FrameOptions()).has_no_points


@pytest.mark.parametrize(("factor", "scale"), [(1 / 255, 1.0), (1, 255.0), (200, 65535.0), (0, None)])
def test_golden_frame_of_a_user_tells_the_scale_of_intensities(factor, scale):
    built = config(use_dim=5)
    built["test_dataloader"]["dataset"]["type"] = "MyDataset"
    pipeline = InputPipeline(built)
    assert pipeline.spec.expected.intensity_max is None
    points = cloud(0)
    points[:, 3] *= factor
    pipeline.expect_intensities_of(Frame(points, FrameOptions()))
    assert pipeline.spec.expected.intensity_max == scale


def test_synthetic_golden_frame_tells_nothing_about_intensities(street):
    built = config(use_dim=5)
    built["test_dataloader"]["dataset"]["type"] = "MyDataset"
    pipeline = InputPipeline(built)
    points = np.hstack([street, np.zeros((len(street), 1), np.float32)])
    pipeline.expect_intensities_of(Frame(points, FrameOptions()))
    assert pipeline.spec.expected.intensity_max is None


def test_spec_names_columns_sweeps_and_expectations_of_nuscenes():
    spec = frame_spec(config(use_dim=[0, 1, 2, 3, 4], pad_empty_sweeps=True))
    assert spec.sweeps == SweepSpec(10, 5, 4, repeats=True)
    assert spec.expected.intensity_max == 255 and spec.expected.uses_intensity
    assert spec.expected.point_cloud_range == (-50, -50, -5, 50, 50, 3)
    assert not frame_spec(config()).expected.uses_intensity  # its sweeps drop the intensity


def test_golden_frame_may_be_a_folder_with_sweeps(tmp_path):
    body = parts([0.05, 0.1], 1.0)
    for name, data in body.items():
        (tmp_path / f"{name}{'.json' if name == 'sweeps' else '.bin'}").write_bytes(data)
    found = read_frame(tmp_path, frame_spec(config()))
    assert {name: data for name, (_, data) in found.items()} == body
    assert found["sweep.1"][0] == "sweep.1.bin"
    alone = read_frame(tmp_path / "points.bin", frame_spec(config()))
    assert alone == {"points": ("frame.bin", body["points"])}
