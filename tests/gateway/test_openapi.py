"""The OpenAPI document holds: valid requests are answered accordingly, and no request causes a 5xx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import fields

import hypothesis
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.requests import Request

from serve.errors import ClientError
from serve.gateway.admission import Admission
from serve.gateway.options import GatewayOptions
from serve.gateway.request import receive_frames
from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.protocol.option_places import TRACK_OPTIONS
from serve.protocol.options import FrameOptions
from serve.storage.references import References
from tests.gateway.conftest import FakeBackend, RunningGateway, running_gateway
from tests.gateway.running import Background, eventually

PATIENT_MS = 20_000
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def running(background: Background) -> Iterator[RunningGateway]:
    backend = FakeBackend(background)
    urls = {"inference_url": backend.url, "management_url": backend.url}
    with running_gateway(background, **urls) as gateway:
        eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
        yield gateway
    backend.go()


@pytest.fixture(scope="module")
def document(running):
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


def test_responses_conform_to_the_openapi_document(document):
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:
        conforms(operation)


def test_every_option_of_a_frame_is_a_query_parameter_of_predictions(running):
    documented = running.client.get("/openapi.json").json()["paths"]["/predictions/{model}"]["post"]
    queries = {each["name"] for each in documented["parameters"] if each["in"] == "query"}
    assert queries == {field.name for field in fields(FrameOptions)} | {
        "timeout_ms",
        "camera",
        *TRACK_OPTIONS,
    }


def conforms(operation) -> None:
    """Ask whatever the document allows; answers must be as it says, and none a 5xx."""

    @hypothesis.settings(max_examples=12, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @given(case=operation.as_strategy(), served=st.booleans())
    def ask(case, served):
        if served and "model" in case.path_parameters:
            case.path_parameters["model"] = "second"
        asked = (case.query or {}).get("timeout_ms")
        if isinstance(asked, int | float) and not isinstance(asked, bool) and 0 < asked < PATIENT_MS:
            case.query["timeout_ms"] = PATIENT_MS  # a deadline of 2 ms may end in 504
        case.call_and_validate(checks=CHECKS)

    ask()


FORM = b'--b\r\ncontent-disposition: form-data; name="data"; filename="f"\r\n\r\n1234\r\n--b--\r\n'
SEEDS = {
    "multipart/form-data; boundary=b": FORM,
    "application/json": json.dumps({"b64": "AAAA", "score_thr": 0.5}).encode(),
    FRAMES_CONTENT_TYPE: pack_frames([(b"1234", {"score_thr": 0.5}), ({"points": b"12", "image": b"3"}, {})]),
    "application/octet-stream": b"1234",
}
EDIT = st.tuples(st.integers(0, 400), st.integers(0, 20), st.binary(max_size=20))


@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(SEEDS))
    | st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40),
    edits=st.lists(EDIT, max_size=4),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    parts=st.sampled_from([(), ("points",), ("points", "image", "calibration")]),
)
def test_any_body_decodes_or_returns_a_client_error(kind, edits, sizes, parts):
    body = bytearray(SEEDS.get(kind, FORM))
    for at, length, instead in edits:
        body[at : at + length] = instead
    admission = Admission(100, 100_000)
    with admission.permit() as permit:
        try:
            received = asyncio.run(received_from(bytes(body), kind, sizes, permit, parts))
        except ClientError as error:
            assert str(error)
        else:
            assert permit.bytes == len(body) and permit.items == len(received.frames)
    assert (admission.items, admission.bytes) == (0, 0)


async def received_from(body, kind, sizes, permit, parts):
    """Receive a body that arrives in pieces of `sizes`, over and over."""
    pieces, at, turn = [], 0, 0
    while at < len(body):
        pieces.append(body[at : at + sizes[turn % len(sizes)]])
        at, turn = at + len(pieces[-1]), turn + 1
    messages = iter(
        [*({"body": piece, "more_body": True} for piece in pieces), {"body": b"", "more_body": False}]
    )

    async def receive():
        return {"type": "http.request", **next(messages)}

    scope = {
        "type": "http", "method": "POST", "path": "/", "query_string": b"", "state": {"request_id": "mine"},
        "headers": [(b"content-type", kind.encode("latin-1"))],
    }  # fmt: skip
    return await receive_frames(
        Request(scope, receive), permit, GatewayOptions(), FrameOptions(), parts, References(())
    )
