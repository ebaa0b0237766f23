"""Options in the wrong place: the error says where they belong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from serve.errors import UnknownOption
from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.protocol.option_places import REQUEST_OPTIONS, TRACK_OPTIONS, unknown_option
from serve.protocol.options import FrameOptions, parse_options
from tests.gateway.conftest import (
    RunningGateway,
    backend,
    background,
    cloud,
    gateway,
    start_gateway,
    torchserve,
)

__all__ = ["backend", "background", "cloud", "gateway", "start_gateway", "torchserve"]  # fixtures

OF_REQUESTS = (*REQUEST_OPTIONS, *TRACK_OPTIONS)


@pytest.mark.parametrize("name", OF_REQUESTS)
def test_option_of_a_request_among_those_of_a_frame_names_query_and_header(name: str) -> None:
    with pytest.raises(UnknownOption) as caught:
        parse_options({name: "1"})
    assert f"?{name}=" in str(caught.value) and f"X-{name.replace('_', '-').title()}" in str(caught.value)


def test_option_that_may_be_in_its_place_is_listed() -> None:
    message = str(unknown_option("colour", ("score_thr",), OF_REQUESTS))
    assert all(name in message for name in (*OF_REQUESTS, "score_thr", "colour"))


@pytest.mark.parametrize("name", OF_REQUESTS)
@pytest.mark.parametrize("place", ["json", "form", "framed"])
def test_gateway_says_where_an_option_of_a_request_belongs(
    gateway: RunningGateway, cloud: Callable[[int], bytes], place: str, name: str
) -> None:
    sent: dict[str, dict[str, Any]] = {
        "json": {"json": {"b64": "AAAA", name: 1}},
        "form": {"files": {"data": cloud(1)}, "data": {name: "1"}},
        "framed": {
            "content": pack_frames([(cloud(1), {name: 1})]),
            "headers": {"content-type": FRAMES_CONTENT_TYPE},
        },
    }
    answer = gateway.post(**sent[place]).json()
    error = answer["outcomes"][0]["error"] if place == "framed" else answer["error"]
    assert error["code"] == "unknown_option" and f"?{name}=" in error["message"]


@pytest.mark.parametrize(
    ("name", "word"), [("uri", "JSON"), ("b64", "JSON"), ("version", "path"), ("format", "Accept")]
)
def test_what_is_no_option_but_belongs_elsewhere_is_placed(
    gateway: RunningGateway, cloud: Callable[[int], bytes], name: str, word: str
) -> None:
    error = gateway.post(content=cloud(1), params={name: "x"}).json()["error"]
    assert error["code"] == "unknown_option" and word in error["message"]


POINTS = {"name": "points", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
SCORES = {"name": "scores_3d"}


@pytest.mark.parametrize("name", ["camera", *TRACK_OPTIONS])
def test_infer_refuses_options_that_it_has_no_use_for(gateway: RunningGateway, name: str) -> None:
    document = {"inputs": [POINTS], "parameters": {name: "1"}}
    found = gateway.post("/v2/models/second/infer", json=document)
    assert (found.status_code, found.json()["code"]) == (400, "unknown_option")


def test_infer_lists_the_options_that_it_has(gateway: RunningGateway) -> None:
    document = {"inputs": [POINTS], "parameters": {"colour": "red"}}
    for found in (
        gateway.post("/v2/models/second/infer", json=document),
        gateway.post("/v2/models/second/infer", json={"inputs": [POINTS]}, params={"colour": "red"}),
    ):
        assert found.json()["code"] == "unknown_option"
        known = found.json()["error"].partition("known: ")[2].split(", ")
        frame_options = {each.name for each in fields(FrameOptions)} - {"fields"}
        assert set(known) == frame_options | {"timeout_ms"}


@pytest.mark.parametrize("name", ["camera", "fields", *TRACK_OPTIONS])
@pytest.mark.parametrize("place", ["request", "query", "header"])
def test_infer_does_not_send_an_option_to_where_it_is_refused_too(
    gateway: RunningGateway, place: str, name: str
) -> None:
    header = f"X-{name.replace('_', '-').title()}"
    sent: dict[str, dict[str, Any]] = {
        "request": {"json": {"inputs": [POINTS], name: "1"}},
        "query": {"json": {"inputs": [POINTS]}, "params": {name: "1"}},
        "header": {"json": {"inputs": [POINTS]}, "headers": {header: "1"}},
    }
    found = gateway.post("/v2/models/second/infer", **sent[place])
    assert (found.status_code, found.json()["code"]) == (400, "unknown_option")
    assert "/predictions" in found.json()["error"]


@pytest.mark.parametrize("name", [*(each.name for each in fields(FrameOptions)), "timeout_ms"])
@pytest.mark.parametrize("place", ["request", "input", "output"])
def test_infer_refuses_an_option_where_it_has_no_effect(
    gateway: RunningGateway, place: str, name: str
) -> None:
    parameters = {"parameters": {name: "1"}}
    document = {
        "request": {"inputs": [POINTS], name: "1"},
        "input": {"inputs": [{**POINTS, **parameters}]},
        "output": {"inputs": [POINTS], "outputs": [{**SCORES, **parameters}]},
    }[place]
    found = gateway.post("/v2/models/second/infer", json=document)
    assert (found.status_code, found.json()["code"]) == (400, "unknown_option")


@pytest.mark.parametrize(
    "document",
    [
        {"inputs": [{**POINTS, "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 16}}]},
        {"inputs": [POINTS], "outputs": [{**SCORES, "parameters": {"shared_memory_region": "r"}}]},
        {"inputs": [POINTS], "outputs": [{**SCORES, "parameters": {"classification": 3}}]},
        {"inputs": [POINTS], "outputs": [SCORES, SCORES]},
        {"inputs": [POINTS], "outputs": [{**SCORES, "parameters": {"binary_data": "false"}}]},
        {"inputs": [POINTS], "parameters": {"binary_data_output": "false"}},
    ],
)
def test_infer_refuses_what_it_would_otherwise_pass_over(
    gateway: RunningGateway, document: dict[str, Any]
) -> None:
    found = gateway.post("/v2/models/second/infer", json=document)
    assert (found.status_code, found.json()["code"]) in ((400, "bad_request"), (400, "unknown_option"))


@pytest.mark.parametrize("name", ["classes", "score_thr", "colour"])
def test_option_that_is_given_twice_is_refused(
    gateway: RunningGateway, cloud: Callable[[int], bytes], name: str
) -> None:
    twice = [(name, "0.5"), (name, "0.25")]
    found = gateway.post(content=cloud(1), params=twice)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "unknown_option")
    form = b"".join(
        b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n0.5\r\n' % name.encode() for _ in twice
    )
    form += (
        b'--b\r\ncontent-disposition: form-data; name="data"; filename="f"\r\n\r\n'
        + cloud(1)
        + b"\r\n--b--\r\n"
    )
    found = gateway.post(content=form, headers={"content-type": "multipart/form-data; boundary=b"})
    assert (found.status_code, found.json()["error"]["code"]) == (400, "unknown_option")


def test_header_may_be_utf_8(gateway: RunningGateway, cloud: Callable[[int], bytes]) -> None:
    found = gateway.post(content=cloud(1), headers={"X-Classes": "行人,Über".encode()})
    assert found.json()["options"]["classes"] == ["行人", "Über"]
    latin = gateway.post(content=cloud(1), headers={"X-Classes": "Über".encode("latin-1")})
    assert latin.json()["options"]["classes"] == ["Über"]
