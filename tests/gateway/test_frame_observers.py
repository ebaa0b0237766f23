"""Observers of finished frames: told of every outcome, and without an effect on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from serve.errors import UndecodableFrame
from serve.gateway.models import ModelVersion
from tests.gateway.conftest import RunningGateway
from tests.gateway.fake_torchserve import answer_for
from tests.gateway.running import eventually


def test_observers_get_each_frame_with_its_outcome_whichever_way_it_came(
    start_gateway: Callable[..., RunningGateway],
) -> None:
    gateway = start_gateway()
    seen: list[tuple[str, bytes, Any]] = []

    def observe(model: ModelVersion, frame: Any, outcome: Any) -> None:
        seen.append((model.state.version, bytes(frame.join()), outcome))

    gateway.registry.frame_observers.append(observe)
    good, bad = np.arange(64, dtype=np.float32).tobytes(), b"bad!"
    gateway.post(content=good)
    eventually(lambda: len(seen) == 1)
    assert seen[0][:2] == ("1.0", good) and bytes(seen[0][2].value.body) == answer_for(good, {})
    gateway.post(files=[("data", good), ("data", bad)], headers={"accept": "application/x-ndjson"})
    eventually(lambda: len(seen) == 3)
    assert {body: type(outcome) for _, body, outcome in seen[1:]}[bad] is UndecodableFrame
    tensor = {
        "name": "frame",
        "shape": [1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(good) + 4},
    }
    header = json.dumps({"inputs": [tensor]}).encode()
    answer = gateway.post(
        "/v2/models/second/infer",
        content=header + len(good).to_bytes(4, "little") + good,
        headers={"inference-header-content-length": str(len(header))},
    )
    assert answer.status_code == 200, answer.text
    eventually(lambda: len(seen) == 4)
    assert seen[3][1] == good


def test_an_observer_that_fails_changes_no_answer(start_gateway: Callable[..., RunningGateway]) -> None:
    gateway = start_gateway()
    calls = []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        raise RuntimeError("observer")

    gateway.registry.frame_observers.append(fail)
    body = np.arange(64, dtype=np.float32).tobytes()
    assert gateway.post(content=body).content == answer_for(body, {})
    eventually(lambda: calls)
    assert gateway.post(content=body).status_code == 200
