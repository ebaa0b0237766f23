"""Options of the client as headers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from serve.client.options import option_headers
from serve.errors import UnknownOption
from serve.protocol.options import parse_options


@pytest.mark.parametrize(
    ("name", "given", "same"),
    [
        ("classes", ["Car", "行人"], "Car,行人"), ("classes", ("a, b",), ["a, b"]), ("classes", {"Car"}, "Car"),
        ("classes", np.array(["Car", "Van"]), "Car,Van"), ("classes", '["行人"]', ["行人"]),
        ("classes", "Car\n", "Car"), ("columns", " x,y,z ", "x,y,z"),
        ("class_thr", {"Car": np.float32(0.5)}, "Car=0.5"),
        ("class_thr", "行人=0.5, Car=0.25", {"行人": 0.5, "Car": 0.25}),
        ("score_thr", np.float32(0.5), 0.5), ("max_detections", np.int64(3), 3), ("fields", ["names"], "names"),
        ("fields", (name for name in ("names", "scores")), ["names", "scores"]),
    ],
)  # fmt: skip
def test_header_has_the_value_of_an_option(name: str, given: Any, same: Any) -> None:
    (header,) = option_headers({name: given}).values()
    assert header.isascii() and header.isprintable()
    assert parse_options({name: header}) == parse_options({name: same})


@pytest.mark.parametrize(
    "options",
    [
        {"columns": "x,y\r\nX-Evil: 1"}, {"track_session": "é"}, {"class_thr": "行人"},
        {"class_thr": {"Car": object()}},
        {"score_threshold": 0.5}, {"timeout_ms": 5}, {"camera": "{}"}, {"token": "secret"}, {"format": "csv"},
    ],
)  # fmt: skip
def test_what_no_header_can_hold_is_refused(options: Any) -> None:
    with pytest.raises(UnknownOption) as caught:
        option_headers(options)
    assert next(iter(options)) in str(caught.value)


def test_deadline_as_the_server_names_it_is_that_of_the_client() -> None:
    with pytest.raises(UnknownOption, match="timeout_s"):
        option_headers({"timeout_ms": 5})


def test_names_with_commas_stay_whole() -> None:
    assert json.loads(option_headers({"classes": ["a, b", "c"]})["X-Classes"]) == ["a, b", "c"]
