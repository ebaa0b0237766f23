"""Translation between the messages of the Open Inference Protocol and its requests and responses over HTTP.

Tensors keep their bytes: an entry of ``raw_input_contents`` is a tensor of the binary extension, and the same the other
way round. What a tensor, a parameter or a model may be, `serve.gateway.routes.kserve_codec` alone decides.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote as quote_path

import numpy as np
import orjson
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import DecodeError

from serve.errors import BackendBroken, BadRequest, ModelNotFound, quote
from serve.gateway.grpc.calls import HttpRequest
from serve.gateway.grpc.messages import POOL, message_class
from serve.gateway.grpc.wire import split_message
from serve.protocol.batch import Bytes

__all__ = ["METHODS", "Method", "read_infer", "write_infer", "write_stream_error", "write_stream_infer"]

_HEADER_LENGTH = b"inference-header-content-length"
_RAW_INPUT_CONTENTS = 7
_ONLY_BINARY = {"binary_data_output": True}
# Field of InferTensorContents and numpy type on the wire of the binary extension, by datatype.
_CONTENTS: Mapping[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
}

_InferRequest = message_class("inference.ModelInferRequest")
_InferResponse = message_class("inference.ModelInferResponse")
_StreamInferResponse = message_class("inference.ModelStreamInferResponse")


@dataclass(frozen=True)
class Method:
    """One method of the service.

    Attributes:
        read: message to request.
        write: status, headers and body of a response to the message; called with a status below 400, or with one of
            `answered`.
        answered: statuses of 400 or more that are an answer rather than an error.
    """

    read: Callable[[bytes], HttpRequest]
    write: Callable[[int, Mapping[bytes, bytes], bytes], bytes]
    answered: Sequence[int] = ()


def read_infer(message: bytes) -> HttpRequest:
    """Translate a ModelInferRequest.

    Raises:
        BadRequest: it violates the protocol.
        ModelNotFound: its model can have no such name.
        FrameTooLarge: it has more fields than any request needs, or long tensors outside of ``raw_input_contents``.
    """
    header, raw = split_message(memoryview(message), _RAW_INPUT_CONTENTS)
    request = _parse(_InferRequest, header)
    tensors: list[Bytes]
    if raw:
        if len(raw) != len(request.inputs):
            raise BadRequest(
                f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; send each tensor in the "
                "request, as shared memory is not supported"
            )
        tensors = list(raw)
    else:
        tensors = [_pack_contents(tensor) for tensor in request.inputs]
    document: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {**_read_parameters(tensor.parameters), "binary_data_size": len(data)},
            }
            for tensor, data in zip(request.inputs, tensors, strict=True)
        ],
        "outputs": [
            {"name": output.name, "parameters": {**_read_parameters(output.parameters), "binary_data": True}}
            for output in request.outputs
        ],
        "parameters": {**_read_parameters(request.parameters), **_ONLY_BINARY},
    }
    if request.id:
        document["id"] = request.id
    json = orjson.dumps(document)
    return HttpRequest(
        "POST",
        f"{_model_path(request.model_name, request.model_version)}/infer",
        ((_HEADER_LENGTH, b"%d" % len(json)), (b"content-type", b"application/octet-stream")),
        [json, *tensors],
        request.id,
    )


def write_infer(status: int, headers: Mapping[bytes, bytes], body: bytes) -> bytes:
    """Translate the response to frames to a ModelInferResponse."""
    return bytes(_build_infer(headers, body).SerializeToString())


def write_stream_infer(status: int, headers: Mapping[bytes, bytes], body: bytes) -> bytes:
    """Translate the response to frames to a ModelStreamInferResponse, the only one to its request."""
    answer = _build_infer(headers, body)
    answer.parameters["triton_final_response"].bool_param = True
    return bytes(_StreamInferResponse(infer_response=answer).SerializeToString())


def write_stream_error(message: str, code: str, request_id: str) -> bytes:
    """Build the ModelStreamInferResponse of a request that failed.

    Triton's client passes on nothing but the message, so the request's id is in it too.
    """
    answer = _InferResponse(id=request_id)
    answer.parameters["triton_final_response"].bool_param = True
    answer.parameters["error_code"].string_param = code
    text = f"request {request_id[:80]!r}: {message}" if request_id else message
    return bytes(_StreamInferResponse(error_message=text or code, infer_response=answer).SerializeToString())


def _parse(kind: Any, message: bytes) -> Any:
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise BadRequest(f"not a {kind.DESCRIPTOR.name}: {str(error)[:200]}") from None


def _model_path(name: str, version: str) -> str:
    """Return the path of a model over HTTP."""
    for given in (name, version):
        if "/" in given:
            raise ModelNotFound(f"model {quote(name)} version {quote(version)} not found: a name has no '/'")
    if not name:
        raise BadRequest("the request names no model")
    path = f"/v2/models/{quote_path(name, safe='')}"
    return f"{path}/versions/{quote_path(version, safe='')}" if version else path


def _read_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Read a map of InferParameter; one without a value is left out."""
    return {
        name: getattr(value, kind)
        for name, value in parameters.items()
        if (kind := value.WhichOneof("parameter_choice"))
    }


def _pack_contents(tensor: Any) -> bytes:
    """Pack typed contents as the binary extension does; an unknown datatype is left to the codec."""
    contents = tensor.contents
    if tensor.datatype == "BYTES":
        return b"".join(struct.pack("<I", len(element)) + element for element in contents.bytes_contents)
    if tensor.datatype not in _CONTENTS:
        return b""
    field, kind = _CONTENTS[tensor.datatype]
    values = getattr(contents, field)
    try:
        return np.array(values, dtype=kind).tobytes()
    except OverflowError:
        raise BadRequest(f"input {quote(tensor.name)} has values beyond {tensor.datatype}") from None


def _build_infer(headers: Mapping[bytes, bytes], body: bytes) -> Any:
    json_bytes = int(headers.get(_HEADER_LENGTH, b"%d" % len(body)))
    document = orjson.loads(body[:json_bytes])
    answer = _InferResponse(
        model_name=document["model_name"],
        model_version=document["model_version"],
        id=document.get("id", ""),
    )
    at = json_bytes
    for output in document["outputs"]:
        answer.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        nbytes = output["parameters"]["binary_data_size"]
        answer.raw_output_contents.append(body[at : at + nbytes])
        at += nbytes
    return answer


def _plain(path: str) -> Callable[[bytes], HttpRequest]:
    return lambda message: HttpRequest("GET", path)


def _of_model(request: str, suffix: str) -> Callable[[bytes], HttpRequest]:
    kind = message_class(f"inference.{request}")

    def read(message: bytes) -> HttpRequest:
        given = _parse(kind, split_message(memoryview(message), -1)[0])
        return HttpRequest("GET", _model_path(given.name, given.version) + suffix)

    return read


def _read_statistics(message: bytes) -> HttpRequest:
    given = _parse(_StatisticsRequest, split_message(memoryview(message), -1)[0])
    path = _model_path(given.name, given.version) if given.name else "/v2/models"
    return HttpRequest("GET", f"{path}/stats")


def _read_index(message: bytes) -> HttpRequest:
    given = _parse(_IndexRequest, split_message(memoryview(message), -1)[0])
    document = {"repository_name": given.repository_name, "ready": given.ready}
    headers = ((b"content-type", b"application/json"),)
    return HttpRequest("POST", "/v2/repository/index", headers, [orjson.dumps(document)])


def _of_repository(request: str, action: str) -> Callable[[bytes], HttpRequest]:
    kind = message_class(f"inference.{request}")

    def read(message: bytes) -> HttpRequest:
        name = _parse(kind, split_message(memoryview(message), -1)[0]).model_name
        return HttpRequest("POST", f"/v2/repository/models/{quote_path(name, safe='')}/{action}")

    return read


def _from_json(response: str, field: str = "") -> Callable[[int, Mapping[bytes, bytes], bytes], bytes]:
    """Return the translation of a JSON body to the message `response`, or to its only field."""
    kind = message_class(f"inference.{response}")

    def write(status: int, headers: Mapping[bytes, bytes], body: bytes) -> bytes:
        document = orjson.loads(body)
        try:
            message = ParseDict(
                {field: document} if field else document,
                kind(),
                ignore_unknown_fields=True,
                descriptor_pool=POOL,
            )
        except ParseError as error:
            raise BackendBroken(f"the response does not fit {response}: {error}") from None
        return bytes(message.SerializeToString())

    return write


def _write_ready(status: int, headers: Mapping[bytes, bytes], body: bytes) -> bytes:
    return bytes(message_class("inference.ModelReadyResponse")(ready=status == 200).SerializeToString())


_StatisticsRequest = message_class("inference.ModelStatisticsRequest")
_IndexRequest = message_class("inference.RepositoryIndexRequest")

# ModelStreamInfer is not among them: it has many requests.
METHODS: Mapping[str, Method] = {
    "ServerLive": Method(_plain("/v2/health/live"), _from_json("ServerLiveResponse")),
    "ServerReady": Method(_plain("/v2/health/ready"), _from_json("ServerReadyResponse"), answered=(503,)),
    "ServerMetadata": Method(_plain("/v2"), _from_json("ServerMetadataResponse")),
    "ModelReady": Method(_of_model("ModelReadyRequest", "/ready"), _write_ready, answered=(404, 503)),
    "ModelMetadata": Method(_of_model("ModelMetadataRequest", ""), _from_json("ModelMetadataResponse")),
    "ModelConfig": Method(
        _of_model("ModelConfigRequest", "/config"), _from_json("ModelConfigResponse", "config")
    ),
    "ModelStatistics": Method(_read_statistics, _from_json("ModelStatisticsResponse")),
    "RepositoryIndex": Method(_read_index, _from_json("RepositoryIndexResponse", "models")),
    "RepositoryModelLoad": Method(
        _of_repository("RepositoryModelLoadRequest", "load"), _from_json("RepositoryModelLoadResponse")
    ),
    "RepositoryModelUnload": Method(
        _of_repository("RepositoryModelUnloadRequest", "unload"), _from_json("RepositoryModelUnloadResponse")
    ),
    "ModelInfer": Method(read_infer, write_infer),
}
