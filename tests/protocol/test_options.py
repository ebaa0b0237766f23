"""Options of a frame: numbers as text, and invalid values named."""

from __future__ import annotations

import pytest

from serve.errors import UnknownOption
from serve.protocol.options import FrameOptions, parse_options


def test_options_accept_strings_and_numbers():
    assert parse_options({"score_thr": "0.3", "max_detections": 5}) == FrameOptions(
        score_thr=0.3, max_detections=5
    )
    assert parse_options({"num_points": "0"}, FrameOptions(score_thr=0.2)) == FrameOptions(
        score_thr=0.2, num_points=0
    )


@pytest.mark.parametrize(
    "values",
    [
        {"score_threshold": "0.3"},
        {"score_thr": "high"},
        {"score_thr": "nan"},
        {"score_thr": 1.5},
        {"score_thr": True},
        {"score_thr": None},
        {"max_detections": "-1"},
        {"max_detections": "1.5"},
        {"max_detections": 2.5},
        {"max_detections": [3]},
        {"load_dim": "99999999999999"},
    ],
)
def test_invalid_option_is_named(values):
    with pytest.raises(UnknownOption, match=next(iter(values))):
        parse_options(values)
