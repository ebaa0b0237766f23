"""The wire format: descriptors beside Triton's own, messages of any bytes, and the mapping of statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

grpc = pytest.importorskip("grpc", reason="needs the extra grpc")

from google.protobuf.descriptor_pb2 import FileDescriptorSet  # noqa: E402

from serve import errors  # noqa: E402
from serve.errors import BadRequest, ClientError, FrameTooLarge, ServeError, error_body  # noqa: E402
from serve.gateway.grpc import messages  # noqa: E402
from serve.gateway.grpc.messages import INFERENCE, POOL, message_class  # noqa: E402
from serve.gateway.grpc.status import CODES, read_error, status_code  # noqa: E402
from serve.gateway.grpc.translation import METHODS, read_infer  # noqa: E402
from serve.gateway.grpc.wire import MAX_FIELDS, MAX_HEADER_BYTES, split_message  # noqa: E402
from serve.gateway.response import encode_error  # noqa: E402
from serve.gateway.routes.kserve_codec import decode_infer  # noqa: E402
from tests.gateway.fake_torchserve import CLOUDS, FUSION, IMAGES  # noqa: E402

FOLDER = Path(messages.__file__).parent


def compiled(name: str) -> Any:
    (file,) = FileDescriptorSet.FromString((FOLDER / f"{name}.binpb").read_bytes()).file
    return file


def walk(messages: Any, prefix: str = "") -> Any:
    for message in messages:
        yield prefix + message.name, message
        yield from walk(message.nested_type, f"{prefix}{message.name}.")


def test_every_field_is_that_of_triton() -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    theirs: dict[str, Any] = {}
    enums: dict[str, Any] = {}
    for file in (service_pb2.DESCRIPTOR, *service_pb2.DESCRIPTOR.dependencies):
        proto = FileDescriptorProto()
        file.CopyToProto(proto)
        theirs |= dict(walk(proto.message_type))
        enums |= {each.name: each for each in proto.enum_type}
    ours = compiled("open_inference")
    count = 0
    for name, message in walk(ours.message_type):
        fields = {field.name: field for field in theirs[name].field}
        for field in message.field:
            other = fields[field.name]
            same = ("number", "type", "label", "type_name")
            assert [getattr(field, key) for key in same] == [getattr(other, key) for key in same], name
            assert field.HasField("oneof_index") == other.HasField("oneof_index"), (name, field.name)
            count += 1
    assert count > 100
    for enum in ours.enum_type:
        values = {each.name: each.number for each in enums[enum.name].value}
        assert {each.name: each.number for each in enum.value}.items() <= values.items()


def test_methods_are_those_of_the_service() -> None:
    service = POOL.FindServiceByName(INFERENCE)
    assert {method.name for method in service.methods} == {*METHODS, "ModelStreamInfer"}


@pytest.mark.parametrize("name", ["open_inference", "health"])
def test_compiled_descriptors_are_those_of_the_source(name: str, tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools")
    out = tmp_path / "out.binpb"
    command = ["-m", "grpc_tools.protoc", f"-I{FOLDER}", f"--descriptor_set_out={out}", f"{name}.proto"]
    subprocess.run([sys.executable, *command], check=True, cwd=FOLDER)
    assert FileDescriptorSet.FromString(out.read_bytes()).file[0] == compiled(name)


def kinds(base: type[ServeError]) -> set[type[ServeError]]:
    return {base}.union(*(kinds(each) for each in base.__subclasses__()))


def test_every_status_of_the_tree_of_errors_has_a_status_of_its_own() -> None:
    of_requests = kinds(ServeError) - kinds(errors.SetupError)
    assert {each.status for each in of_requests} <= set(CODES)
    # What is sent again unchanged may succeed; nothing that the client must change has such a status.
    again = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    retried = {each for each in of_requests if status_code(each.status) in again}
    assert {each.code for each in retried} == {"overloaded", "not_ready", "out_of_memory"}
    assert status_code(418) is grpc.StatusCode.INVALID_ARGUMENT
    assert status_code(511) is grpc.StatusCode.INTERNAL


def test_error_is_read_in_the_form_of_either_protocol() -> None:
    nested = read_error(404, encode_error(errors.ModelNotFound("gone"), "id"))
    flat = read_error(404, b'{"error":"gone","code":"model_not_found"}')
    assert nested == flat
    assert (flat.status, flat.message, flat.code) == (grpc.StatusCode.NOT_FOUND, "gone", "model_not_found")
    assert read_error(500, b"<html>").status is grpc.StatusCode.INTERNAL
    assert error_body(BadRequest("x"))["error"]["code"] == "bad_request"


Request = message_class("inference.ModelInferRequest")
TEXT = st.text(max_size=6)
RAW = st.lists(st.binary(max_size=40), max_size=4)


@given(name=TEXT, identity=TEXT, raw=RAW, tensors=st.lists(TEXT, max_size=3))
def test_split_message_and_its_parts_are_the_message(name, identity, raw, tensors) -> None:
    request = Request(model_name=name, id=identity, raw_input_contents=raw)
    for each in tensors:
        request.inputs.add(name=each, shape=[1, 2])
    header, found = split_message(memoryview(request.SerializeToString()), 7)
    assert [bytes(each) for each in found] == raw
    request.ClearField("raw_input_contents")
    assert Request.FromString(header) == request


@given(message=st.binary(max_size=60))
def test_any_bytes_split_or_raise_a_client_error(message) -> None:
    try:
        header, found = split_message(memoryview(message), 7)
    except ClientError as error:
        assert str(error)
    else:
        assert len(header) + sum(map(len, found)) <= len(message)


INPUT = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["points", "frame", "image", "x"]),
        "shape": st.lists(st.integers(-1, 5), max_size=3),
    },
    optional={"datatype": st.sampled_from(["FP32", "BYTES", "UINT8", "INT64", "INT8", "BF16", "FP16", ""])},
)
CONTENTS = st.fixed_dictionaries(
    {},
    optional={
        "fp32_contents": st.lists(st.floats(width=32), max_size=8),
        "int_contents": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8),
        "uint_contents": st.lists(st.integers(0, 2**32 - 1), max_size=8),
        "int64_contents": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8),
        "bytes_contents": st.lists(st.binary(max_size=8), max_size=4),
    },
)
PARAMETER = st.sampled_from(
    [{}, {"bool_param": True}, {"int64_param": -5}, {"string_param": "x"}, {"double_param": float("nan")}]
)


@given(
    inputs=st.lists(st.tuples(INPUT, CONTENTS), max_size=3),
    raw=RAW,
    parameters=st.dictionaries(TEXT, PARAMETER, max_size=3),
    outputs=st.lists(st.sampled_from(["scores_3d", "detections", "x", ""]), max_size=3),
    spec=st.sampled_from([CLOUDS, IMAGES, FUSION]),
)
def test_any_infer_message_decodes_or_raises_a_client_error(inputs, raw, parameters, outputs, spec) -> None:
    request = Request(model_name="m", raw_input_contents=raw)
    for given_input, contents in inputs:
        request.inputs.add(**given_input, contents=contents)
    for name, value in parameters.items():
        for field, each in value.items():
            setattr(request.parameters[name], field, each)
    for name in outputs:
        request.outputs.add(name=name)
    try:
        translated = read_infer(request.SerializeToString())
        length = dict(translated.headers)[b"inference-header-content-length"].decode()
        decode_infer(b"".join(bytes(piece) for piece in translated.body), length, spec)
    except ClientError as error:
        assert str(error)


def test_message_of_many_fields_is_refused_before_it_is_parsed() -> None:
    empty_inputs = b"\x2a\x00" * (MAX_FIELDS + 1)
    with pytest.raises(FrameTooLarge):
        read_infer(empty_inputs)
    header = Request(model_name="m", id="x" * MAX_HEADER_BYTES).SerializeToString()
    with pytest.raises(FrameTooLarge):
        read_infer(header)
    raw = Request(model_name="m", raw_input_contents=[bytes(2 * MAX_HEADER_BYTES)])
    raw.inputs.add(name="points", datatype="UINT8", shape=[2 * MAX_HEADER_BYTES])
    assert sum(map(len, read_infer(raw.SerializeToString()).body)) > 2 * MAX_HEADER_BYTES


@pytest.mark.parametrize(
    "message",
    [
        b"\xff" * 11,
        b"\x2b",
        b"\x3a\x05abc",
        b"\x0a\x80",
        b"\x0a\x02\xff\xff",
        Request(model_name="m", id="x").SerializeToString() + b"\x2a\x02\x0a\x09",
    ],
)
def test_bytes_that_are_no_message_are_a_bad_request(message: bytes) -> None:
    with pytest.raises(BadRequest):
        read_infer(message)
