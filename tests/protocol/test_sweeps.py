"""The part ``sweeps``: JSON of times and poses is read as meant, or refused by the place of its fault."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import BadRequest, ClientError, UndecodableFrame, UnknownOption
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.json_bodies import decode_json_request
from serve.protocol.options import FrameOptions, parse_options
from serve.protocol.sweeps import MAX_SWEEPS, SweepPose, SweepSpec, is_sweep_part, nearest, parse_sweeps
from serve.settings import Limits

IDENTITY = np.eye(4).tolist()
SHIFTED = [[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def entry(**members):
    return {"time_lag_s": 0.1, "transform": IDENTITY, **members}


def without(name, **members):
    return {key: value for key, value in entry(**members).items() if key != name}


def test_transform_becomes_upstreams_matrix():
    (pose,) = parse_sweeps(json.dumps([entry(transform=SHIFTED)]).encode())
    assert pose.time_lag_s == 0.1 and pose.lidar2sensor[:3, 3].tolist() == [-2, 0, 0]


def test_times_are_relative_to_that_of_the_key_frame():
    document = {"timestamp_s": 12.5, "sweeps": [without("time_lag_s", timestamp_s=12.25)]}
    assert parse_sweeps(json.dumps(document).encode())[0].time_lag_s == 0.25


@pytest.mark.parametrize(
    "document",
    [
        "text",
        {"sweeps": "accumulated"},
        {"sweeps": [], "poses": []},
        {"timestamp_s": None, "sweeps": []},
        [1],
        [entry(time_lag_s=-0.01)],
        [entry(time_lag_s=50_000)],
        [entry(time_lag_s=True)],
        [entry(time_lag_s="0.1")],
        [entry(timestamp_s=1.0)],
        [without("time_lag_s", timestamp_s=1.0)],
        [without("time_lag_s")],
        [without("transform")],
        [entry(lidar2sensor=IDENTITY)],
        [entry(pose=IDENTITY)],
        [entry(transform=IDENTITY[:3])],
        [entry(transform=[1, 0, 0, 0])],
        [entry(transform=np.diag([2.0, 2, 2, 1]).tolist())],
        [entry(transform=np.diag([1.0, 1, -1, 1]).tolist())],
        [entry(transform=np.transpose(SHIFTED).tolist())],
        [entry(transform=[*SHIFTED[:2], [0, 0, 1, 5e5], [0, 0, 0, 1]])],
        [entry(transform=[[1, 0, 0, None], *SHIFTED[1:]])],
        [entry(transform=[[1e308, 0, 0, 0], *SHIFTED[1:]])],
        [entry()] * (MAX_SWEEPS + 1),
    ],
)
def test_implausible_sweeps_are_refused(document):
    with pytest.raises(UndecodableFrame):
        parse_sweeps(json.dumps(document).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(IDENTITY),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(
                ["time_lag_s", "timestamp_s", "transform", "lidar2sensor", "points", "b64", "sweeps"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=24,
)


@given(JSON)
def test_any_json_is_read_or_refused_with_a_clients_error(document):
    body = json.dumps(document).encode()
    try:
        poses = parse_sweeps(body)
    except UndecodableFrame:
        poses = []
    for pose in poses:
        assert pose.time_lag_s >= 0 and np.isfinite(pose.lidar2sensor).all()
    try:
        parts, _ = decode_json_request(json.dumps({"points": {"b64": ""}, "sweeps": document}).encode())
        assert "points" in parts
    except ClientError:
        pass


@given(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.2]), max_size=12), st.integers(0, 12))
def test_nearest_sweeps_keep_their_order_and_none_left_out_is_later(lags, number):
    poses = [SweepPose(lag, np.eye(4)) for lag in lags]
    chosen = nearest(poses, number)
    assert chosen == sorted(chosen) and len(chosen) == min(number, len(lags))
    left = [lags[k] for k in range(len(lags)) if k not in chosen]
    assert not left or not chosen or max(lags[k] for k in chosen) <= min(left)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sweep.0", None, True),
        ("sweeps", None, True),
        ("sweeps", b' [{"time_lag_s": 0}]', True),
        ("sweeps", [], True),
        ("sweeps", "accumulated", False),
        ("sweeps", b"accumulated", False),
        ("sweeping", "[", False),
    ],
)
def test_sweeps_is_a_part_or_an_option_by_its_value(name, value, expected):
    assert is_sweep_part(name, value) is expected


def test_option_sweeps_takes_one_word():
    assert parse_options({"sweeps": "accumulated"}).sweeps == "accumulated"
    with pytest.raises(UnknownOption):
        parse_options({"sweeps": "all"})
    with pytest.raises(UnknownOption, match="points"):
        parse_options({"sweeps": [entry()]})


def test_more_listed_clouds_than_the_limit_are_refused():
    listed = [{"points": {"b64": ""}}] * (MAX_SWEEPS + 1)
    with pytest.raises(BadRequest):
        decode_json_request(json.dumps({"points": {"b64": ""}, "sweeps": listed}).encode())


def swept(lags: list[float], *, accumulated: bool = False) -> list[str]:
    """Codes of the warnings about a frame whose sweeps, or points, are so many seconds old."""
    cloud = np.random.default_rng(0).uniform(1, 9, (len(lags) or 9, 5)).astype("<f4")
    spec = FrameSpec("lidar", load_dim=5, sweeps=SweepSpec(number=9))
    body = {"points": cloud.tobytes()}
    if accumulated:
        cloud[:, 4] = lags
        body["points"] = cloud.tobytes()
    else:
        body["sweeps"] = json.dumps([entry(time_lag_s=lag) for lag in lags]).encode()
        body |= {f"sweep.{k}": cloud.tobytes() for k in range(len(lags))}
    options = FrameOptions(sweeps="accumulated" if accumulated else None)
    return [warning.code for warning in decode_frame(body, spec, options, Limits()).warnings]


@pytest.mark.parametrize("accumulated", [False, True])
def test_times_in_milliseconds_are_answered_with_a_warning(accumulated):
    assert "sweep_times" in swept([50, 100, 150], accumulated=accumulated)
    assert "sweep_times" not in swept([0, 0.05, 0.45], accumulated=accumulated)


def test_points_after_their_key_frame_are_answered_with_a_warning():
    assert "sweep_times" in swept([0, -0.05], accumulated=True)
