"""Whatever goes wrong with one frame, with any exception, is its own outcome; its neighbours are answered."""

from __future__ import annotations

import json
from typing import Any

import ormsgpack
import pytest

from serve.protocol.batch import FRAMES_CONTENT_TYPE, Outcomes, pack_frames, pack_outcomes
from tests.gateway import fake_torchserve
from tests.gateway.fake_torchserve import answer_for

# Nothing that is raised for a frame needs to be known beforehand.
UNFORESEEN = [
    RuntimeError("odd"),
    RecursionError(),
    MemoryError(),
    KeyError("x"),
    UnicodeEncodeError("a", "b", 0, 1, "c"),
]


def three(gateway, cloud, options: dict[str, Any] | None = None) -> list[Any]:
    """Outcomes of three frames of one request, the second of which has these options."""
    body = pack_frames([(cloud(0), {}), (cloud(1), options or {}), (cloud(2), {})])
    answer = gateway.post(content=body, headers={"content-type": FRAMES_CONTENT_TYPE})
    assert answer.status_code == 200, answer.text
    outcomes = answer.json()["outcomes"]
    for number in (0, 2):
        assert outcomes[number]["answer"] == json.loads(answer_for(cloud(number), {}))
    return outcomes


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_error_while_options_are_read_is_the_outcome_of_the_frame(gateway, cloud, monkeypatch, error):
    from serve.gateway import request

    real = request.parse_options

    def parse(values: Any, *more: Any, **named: Any) -> Any:
        if "columns" in values:
            raise error
        return real(values, *more, **named)

    monkeypatch.setattr(request, "parse_options", parse)
    outcomes = three(gateway, cloud, {"columns": "x,y,z"})
    assert outcomes[1]["status"] == 400 and outcomes[1]["error"]["code"] == "bad_request"


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_error_while_a_frame_is_queued_is_its_outcome(gateway, cloud, torchserve, monkeypatch, error):
    from serve.gateway import dispatch

    real = dispatch.estimate_cost

    def estimate(frame: Any, spec: Any) -> Any:
        if bytes(frame.body) == cloud(1):
            raise error
        return real(frame, spec)

    monkeypatch.setattr(dispatch, "estimate_cost", estimate)
    outcomes = three(gateway, cloud)
    assert outcomes[1]["status"] == 500 and outcomes[1]["error"]["code"] == "internal_error"
    assert all(cloud(1) not in call for call in torchserve.calls)


@pytest.mark.parametrize(
    "body", [b"", b"\xff{", b"[" * 5000, b'{"error":{"code":"settings_error"}}', b'{"error":7}']
)
def test_unreadable_error_of_a_worker_is_the_outcome_of_its_frame(gateway, cloud, monkeypatch, body):
    def pack(outcomes: Outcomes) -> bytes:
        items = [
            (422, body) if is_second(answer, cloud) else (status, answer) for status, answer in outcomes.items
        ]
        return pack_outcomes(Outcomes(items, outcomes.seconds))

    monkeypatch.setattr(fake_torchserve, "pack_outcomes", pack)
    outcomes = three(gateway, cloud)
    assert outcomes[1]["status"] >= 400 and outcomes[1]["error"]["code"]


def is_second(answer: bytes, cloud: Any) -> bool:
    return answer == answer_for(cloud(1), {})


def test_answer_that_is_no_json_is_the_error_of_its_frame_in_a_msgpack_list(gateway, cloud, monkeypatch):
    def pack(outcomes: Outcomes) -> bytes:
        items = [
            (status, b"\xff{" if is_second(answer, cloud) else answer) for status, answer in outcomes.items
        ]
        return pack_outcomes(Outcomes(items, outcomes.seconds))

    monkeypatch.setattr(fake_torchserve, "pack_outcomes", pack)
    files = [("data", cloud(number)) for number in range(3)]
    answer = gateway.post(files=files, headers={"accept": "application/x-msgpack"})
    items = ormsgpack.unpackb(answer.content)
    assert items[1]["error"]["code"] == "backend_broken"
    assert [items[0], items[2]] == [json.loads(answer_for(cloud(number), {})) for number in (0, 2)]


def test_part_named_with_a_lone_surrogate_is_the_error_of_its_request_alone(gateway, cloud):
    odd = pack_frames([(cloud(0), {})]).replace(b'"options":{}', b'"options":{"\\ud800":1}')
    head, _, rest = odd.partition(b'{"frames"')
    length = int.from_bytes(head[8:12], "little") + len(b'"\\ud800":1')
    body = head[:8] + length.to_bytes(4, "little") + b'{"frames"' + rest
    answer = gateway.post(content=body, headers={"content-type": FRAMES_CONTENT_TYPE})
    assert 400 <= answer.status_code < 500
    assert gateway.post(content=cloud(1)).status_code == 200
