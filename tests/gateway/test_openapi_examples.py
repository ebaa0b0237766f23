"""Every example of the OpenAPI document is sent, and every answer has the schema that the document gives it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.protocol.option_places import TRACK_OPTIONS
from tests.gateway.conftest import FakeBackend, RunningGateway, running_gateway
from tests.gateway.fake_torchserve import IMAGES, FakeModel
from tests.gateway.running import Background, eventually

PREDICT = "/predictions/{model}"
INFER = "/v2/models/{model}/infer"


@pytest.fixture(scope="module")
def running(background: Background) -> Iterator[RunningGateway]:
    backend = FakeBackend(background)
    backend.app.models["faster-rcnn"] = {"1.0": FakeModel(dict(IMAGES))}
    urls = {"inference_url": backend.url, "management_url": backend.url}
    with running_gateway(background, **urls) as gateway:
        eventually(lambda: len(gateway.client.post("/v2/repository/index", json={"ready": True}).json()) == 2)
        yield gateway
    backend.go()


@pytest.fixture(scope="module")
def document(running: RunningGateway) -> dict[str, Any]:
    found: dict[str, Any] = running.client.get("/openapi.json").json()
    return found


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    jsonschema.validate(
        value, {**schema, "components": document["components"]}, jsonschema.Draft202012Validator
    )


def filled(document: dict[str, Any], path: str, method: str) -> str:
    """The path with the examples of its parameters."""
    examples = {
        each["name"]: each["example"]
        for each in document["paths"][path][method].get("parameters", ())
        if each["in"] == "path"
    }
    return re.sub(r"{(\w+)}", lambda found: str(examples[found[1]]), path)


def answer_schema(document: dict[str, Any], path: str, method: str, status: int, kind: str) -> dict[str, Any]:
    content = document["paths"][path][method]["responses"][str(status)]["content"]
    schema: dict[str, Any] = content[kind]["schema"]
    return schema


def test_every_operation_describes_its_answers_and_parameters(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert all("example" in each for each in operation.get("parameters", ())), path
            for status, answer in operation["responses"].items():
                if path != "/metrics" and not path.endswith("load"):
                    schemas = [each["schema"] for each in answer["content"].values()]
                    assert all(schemas), (method, path, status)


def test_every_get_is_answered_as_described(running: RunningGateway, document: dict[str, Any]) -> None:
    asked = 0
    for path, operations in document["paths"].items():
        if "get" not in operations or path == "/metrics":
            continue
        found = running.client.get(filled(document, path, "get"))
        assert found.status_code == 200, (path, found.text)
        check(document, answer_schema(document, path, "get", 200, "application/json"), found.json())
        asked += 1
    assert asked >= 16


@pytest.mark.parametrize("path", [PREDICT, "/predictions/{model}/{version}", INFER])
def test_every_json_example_is_answered(running: RunningGateway, document: dict[str, Any], path: str) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    assert len(content["examples"]) >= 2
    for example in content["examples"].values():
        check(document, content["schema"], example["value"])
        found = running.post(filled(document, path, "post"), json=example["value"])
        assert found.status_code == 200, found.text
        check(document, answer_schema(document, path, "post", 200, "application/json"), found.json())


def test_index_example_is_answered(running: RunningGateway, document: dict[str, Any]) -> None:
    path = "/v2/repository/index"
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    found = running.post(path, json=content["example"])
    check(document, answer_schema(document, path, "post", 200, "application/json"), found.json())
    assert len(found.json()) == 2


def test_example_of_every_option_is_accepted(
    running: RunningGateway, document: dict[str, Any], cloud: Any
) -> None:
    for each in document["paths"][PREDICT]["post"]["parameters"]:
        if each["in"] != "query":
            continue
        name, example = (
            each["name"],
            str(each["example"]).lower() if each["example"] is True else each["example"],
        )
        sequence = {"track_session": "drive-7", "track_start": "true"} if name in TRACK_OPTIONS else {}
        options = {**sequence, name: example}
        found = running.post("/predictions/second", content=cloud(1), params=options)
        assert found.status_code == 200, (name, found.text)
        by_header = {f"X-{option.replace('_', '-')}": str(value) for option, value in options.items()}
        assert running.post(content=cloud(1), headers=by_header).content == found.content


def test_every_media_type_of_answers_is_given_where_it_can_be(
    running: RunningGateway, document: dict[str, Any], cloud: Any
) -> None:
    documented = document["paths"][PREDICT]["post"]["responses"]["200"]["content"]
    camera = next(
        each["example"]
        for each in document["paths"][PREDICT]["post"]["parameters"]
        if each["name"] == "camera"
    )
    assert len(documented) == 7
    for media in documented:
        found = running.post(content=cloud(1), headers={"accept": media, "x-camera": camera})
        if media == "application/vnd.coco+json":  # holds boxes of images, and this model gives others
            assert found.status_code == 400
            check(document, answer_schema(document, PREDICT, "post", 400, "application/json"), found.json())
        else:
            assert found.status_code == 200, (media, found.text)
            assert found.headers["content-type"].partition(";")[0] == media


@pytest.mark.parametrize("kind", ["application/octet-stream", "multipart/form-data", FRAMES_CONTENT_TYPE])
def test_binary_requests_are_answered_as_described(
    running: RunningGateway, document: dict[str, Any], cloud: Any, kind: str
) -> None:
    assert kind in document["paths"][PREDICT]["post"]["requestBody"]["content"]
    if kind == "multipart/form-data":
        found = running.post(files=[("data", cloud(1)), ("data", cloud(2))])
    elif kind == FRAMES_CONTENT_TYPE:
        found = running.post(content=pack_frames([(cloud(1), {})]), headers={"content-type": kind})
    else:
        found = running.post(content=cloud(1), headers={"content-type": kind})
    assert found.status_code == 200
    check(document, answer_schema(document, PREDICT, "post", 200, "application/json"), found.json())


@pytest.mark.parametrize(
    ("path", "request_", "status"),
    [
        (PREDICT, {"params": {"colour": "red"}}, 400),
        (PREDICT, {"headers": {"accept": "text/html"}}, 406),
        (INFER, {"json": {"inputs": []}}, 400),
        ("/v2/repository/models/{model}/load", {}, 400),
    ],
)
def test_errors_are_as_described(
    running: RunningGateway, document: dict[str, Any], path: str, request_: dict[str, Any], status: int
) -> None:
    found = running.post(filled(document, path, "post"), **request_)
    assert found.status_code == status
    check(document, answer_schema(document, path, "post", status, "application/json"), found.json())
