"""Codec of the Open Inference Protocol (KServe v2), REST: tensors in JSON or its binary extension ↔ frames, answers.

Source: kserve/open-inference-protocol, ``specification/protocol/inference_rest.md``, and Triton's
``extension_binary_data.md``.

The inputs of a model are its parts: ``points`` FP32 [N, load_dim], ``image`` BYTES [1] (an encoded image) or RGB pixels
(`serve.gateway.routes.pixels`), ``calibration`` BYTES [1] (JSON). A model with one part also accepts ``frame`` BYTES
[n]: n encoded frames in one request. Optional inputs of a model of several sweeps are ``sweep.0``, ``sweep.1``, … FP32
[N, load_dim], of which the metadata lists the first, and ``sweeps`` BYTES [1] (JSON). Outputs are concatenated over all
frames; `num_detections` holds the number of each frame.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from serve.errors import BackendBroken, BadRequest, FrameTooLarge, UndecodableFrame, UnknownOption, quote
from serve.gateway.routes.pixels import encode_pixels
from serve.protocol.batch import MAX_NAME_CHARS, MAX_PARTS, Body, Bytes, RawFrame
from serve.protocol.json_reader import JsonBounds, LongText, decode_base64, decode_text, read_json
from serve.protocol.sweeps import is_sweep_part

__all__ = ["InferBounds", "InferRequest", "decode_infer", "encode_infer", "json_bytes", "model_metadata"]

_BOXES = {
    3: ("bboxes_3d", "scores_3d", "labels_3d"),
    2: ("bboxes", "scores", "labels"),
}
_NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_MAX_RANK = 8
_MAX_PARAMETERS = 64
_MAX_TEXT_CHARS = 4096
# Parameters that Triton reserves for itself (``extension_parameters.md``), without a meaning here.
_RESERVED = {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers"}
_RESERVED_PREFIX = "triton_"


@dataclass(frozen=True)
class InferBounds:
    """Upper bounds on one ``infer`` call.

    Attributes:
        json: of its JSON.
        max_frames: elements of a BYTES tensor.
        max_tensor_bytes: size of another tensor, unpacked.
    """

    json: JsonBounds = field(default_factory=JsonBounds)
    max_frames: int = 64
    max_tensor_bytes: int = 64 << 20


@dataclass(frozen=True)
class InferRequest:
    """One ``infer`` call.

    Attributes:
        id: id chosen by the client, returned in the response.
        frames: the frames, in order.
        parameters: options for all frames, and `timeout_ms`.
        outputs: names of the requested outputs, and whether each is binary; None for all outputs.
        binary: default of "binary" for outputs.
    """

    id: str | None
    frames: Sequence[RawFrame]
    parameters: Mapping[str, str]
    outputs: Mapping[str, bool] | None
    binary: bool


def model_metadata(name: str, versions: Sequence[str], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Build the answer to ``GET /v2/models/{name}``."""
    load_dim = int(spec.get("load_dim") or 4)
    tensors = {
        "points": {"datatype": "FP32", "shape": [-1, load_dim]},
        "image": {"datatype": "BYTES", "shape": [1]},
    }
    inputs = [
        {"name": part, **tensors.get(part, {"datatype": "BYTES", "shape": [1]})} for part in _parts(spec)
    ]
    sweeps = spec.get("sweeps")
    optional = (
        [
            {"name": "sweep.0", "datatype": "FP32", "shape": [-1, int(sweeps["load_dim"])], "optional": True},
            {"name": "sweeps", "datatype": "BYTES", "shape": [1], "optional": True},
        ]
        if sweeps
        else []
    )
    return {
        "name": name,
        "versions": list(versions),
        "platform": "mmdet3d-serve",
        "inputs": [*inputs, *optional],
        "outputs": [{"name": tensor, **kind} for tensor, kind in _output_kinds(spec).items()],
    }


def json_bytes(body: bytes | bytearray, header_length: str | None) -> int:
    """Return how many bytes of a body are JSON; tensors in binary follow.

    Raises:
        BadRequest: the ``Inference-Header-Content-Length`` header is not such a number.
    """
    if header_length is None:
        return len(body)
    if not re.fullmatch("[0-9]{1,12}", header_length) or int(header_length) > len(body):
        raise BadRequest(f"Inference-Header-Content-Length {quote(header_length)} does not fit the body")
    return int(header_length)


def decode_infer(
    body: bytes | bytearray,
    header_length: str | None,
    spec: Mapping[str, Any],
    bounds: InferBounds | None = None,
) -> InferRequest:
    """Read a request.

    Args:
        body: the body.
        header_length: the ``Inference-Header-Content-Length`` header.
        spec: description of the model.
        bounds: on the JSON, tensors and frames.

    Raises:
        BadRequest: the request violates the protocol, or does not fit the model.
        UnknownOption: a parameter is no number, boolean or short text.
        FrameTooLarge: more values, elements or frames than `bounds` allow.
        UndecodableFrame: a tensor is not a frame of this model.
    """
    bounds = bounds or InferBounds()
    at = json_bytes(body, header_length)
    header, rest = body if header_length is None else body[:at], memoryview(body)[at:]
    document = _object(read_json(header, bounds.json), "the request")
    tensors: dict[str, npt.NDArray[Any] | list[Bytes]] = {}
    for tensor in _objects(document, "inputs"):
        name = _name(tensor)
        if name in tensors:
            raise BadRequest(f"input {quote(name)} is given twice")
        tensors[name], rest = _read_tensor(name, tensor, rest, bounds)
    if len(rest):
        raise BadRequest(f"{len(rest)} bytes follow the tensors that the header declares")
    parameters = _parameters(document)
    binary = bool(parameters.get("binary_data_output", False))
    outputs = {
        _name(entry): bool(_parameters(entry).get("binary_data", binary))
        for entry in _objects(document, "outputs")
    }
    unknown = set(outputs) - set(_output_kinds(spec))
    if unknown:
        raise BadRequest(f"unknown output {quote(min(unknown))}; available: {', '.join(_output_kinds(spec))}")
    identity = document.get("id")
    if identity is not None and (not isinstance(identity, str | int) or len(str(identity)) > _MAX_TEXT_CHARS):
        raise BadRequest(f"the id must be a text of at most {_MAX_TEXT_CHARS} characters")
    return InferRequest(
        None if identity is None else str(identity),
        _build_frames(tensors, spec),
        {name: str(value) for name, value in parameters.items() if not _is_of_protocol(name)},
        outputs or None,
        binary,
    )


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"not a request of the Open Inference Protocol: {what} must be an object")
    return value


def _objects(document: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """Return the objects that a request lists under `name`; none if it is missing or null."""
    listed = document.get(name)
    if listed is None:
        return []
    if not isinstance(listed, list) or len(listed) > MAX_PARTS:
        raise BadRequest(f"{name} must be a list of at most {MAX_PARTS} objects")
    return [_object(entry, f"an entry of {name}") for entry in listed]


def _name(entry: Mapping[str, Any]) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise BadRequest(f"a tensor needs a name of 1 to {MAX_NAME_CHARS} characters, got {quote(name)}")
    return name


def _parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of a request or tensor: by the protocol texts, numbers or booleans."""
    parameters = _object(entry.get("parameters") or {}, "parameters")
    if len(parameters) > _MAX_PARAMETERS:
        raise BadRequest(f"{len(parameters)} parameters, the limit is {_MAX_PARAMETERS}")
    for name, value in parameters.items():
        if not isinstance(value, str | int | float | bool) or (
            isinstance(value, str) and len(value) > _MAX_TEXT_CHARS
        ):
            raise UnknownOption(
                f"parameter {quote(name)} must be a number, a boolean, or a text of at most {_MAX_TEXT_CHARS} "
                "characters"
            )
    return parameters


def _is_of_protocol(name: str) -> bool:
    """Whether a parameter is the protocol's or Triton's, rather than an option of a frame."""
    return name == "binary_data_output" or name in _RESERVED or name.startswith(_RESERVED_PREFIX)


def _read_tensor(
    name: str, tensor: Mapping[str, Any], rest: memoryview, bounds: InferBounds
) -> tuple[npt.NDArray[Any] | list[Bytes], memoryview]:
    """Read one input tensor; returns it and the rest of the binary part."""
    datatype, parameters = tensor.get("datatype"), _parameters(tensor)
    if not isinstance(datatype, str) or datatype not in {*_NUMPY, "BYTES"}:
        raise BadRequest(f"input {name} has the unknown datatype {quote(datatype)}")
    shape = _read_shape(name, tensor.get("shape"))
    count = math.prod(shape)
    if datatype == "BYTES" and count > bounds.max_frames:
        raise FrameTooLarge(f"input {name} has {count} elements, the limit is {bounds.max_frames}")
    nbytes = 0 if datatype == "BYTES" else count * np.dtype(_NUMPY[datatype]).itemsize
    if nbytes > bounds.max_tensor_bytes:
        raise FrameTooLarge(f"input {name} has {nbytes} bytes, the limit is {bounds.max_tensor_bytes}")
    size = parameters.get("binary_data_size")
    if size is not None:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest):
            raise BadRequest(f"input {name} declares {quote(size)} bytes, {len(rest)} are left")
        data, rest = rest[:size], rest[size:]
        if datatype == "BYTES":
            return _split_bytes(name, data, count), rest
        if size != nbytes:
            raise BadRequest(f"input {name} of shape {shape} and {datatype} cannot have {size} bytes")
        with _errors_of_tensor(name, datatype):
            return np.frombuffer(data, _NUMPY[datatype]).reshape(shape), rest
    values = _flatten(name, tensor.get("data"), len(shape))
    if len(values) != count:
        raise BadRequest(f"input {name} of shape {shape} has {len(values)} values")
    if datatype == "BYTES":
        coded = parameters.get("content_type") == "base64"
        return [_encode_text(name, value, coded, bounds.json.max_bytes) for value in values], rest
    with _errors_of_tensor(name, datatype), np.errstate(over="raise"):  # a float that its type cannot hold
        return np.array(values, dtype=_NUMPY[datatype]).reshape(shape), rest


@contextmanager
def _errors_of_tensor(name: str, datatype: str) -> Iterator[None]:
    """Map what numpy raises for values or a shape that no array has: even an empty one may be too large for it."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BadRequest(f"input {name} is no tensor of {datatype}: {str(error)[:200]}") from None


def _read_shape(name: str, shape: Any) -> list[int]:
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        raise BadRequest(f"the shape of input {name} must be a list of at most {_MAX_RANK} lengths")
    for length in shape:
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length < 1 << 31:
            raise BadRequest(f"the shape of input {name} holds {quote(length)}, which is no length")
    return shape


def _flatten(name: str, data: Any, rank: int) -> list[Any]:
    """Flatten tensor data, which may be flat or nested in JSON; every level is walked once."""
    for _ in range(max(1, rank)):
        if not isinstance(data, list):
            break
        kinds = set(map(type, data))
        if list not in kinds:
            return data
        if len(kinds) > 1:
            raise BadRequest(f"the data of input {name} has lists and values side by side")
        data = list(itertools.chain.from_iterable(data))
    if isinstance(data, list) and list not in set(map(type, data)):
        return data
    raise BadRequest(f"the data of input {name} must be a list, nested at most as deep as its shape")


def _encode_text(name: str, value: Any, coded: bool, max_bytes: int) -> Bytes:
    if not isinstance(value, str | LongText):
        raise BadRequest(f"input {name}: elements of BYTES must be strings in JSON, got {quote(value)}")
    if not coded:
        return decode_text(value, max_bytes)
    try:
        return decode_base64(value)
    except ValueError as error:
        raise BadRequest(f"input {name}: not base64: {error}") from None


def _split_bytes(name: str, data: memoryview, count: int) -> list[Bytes]:
    """Split a BYTES tensor into `count` elements, each preceded by its length (uint32, little-endian)."""
    found: list[Bytes] = []
    at = 0
    for _ in range(count):
        length = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + length > len(data):
            raise BadRequest(f"input {name}: its {len(data)} bytes end before its {count} elements")
        found.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(data):
        raise BadRequest(f"input {name}: {len(data) - at} bytes follow its {count} elements")
    return found


def _parts(spec: Mapping[str, Any]) -> tuple[str, ...]:
    parts = tuple(spec.get("parts") or ())
    return parts or (("points",) if spec["modality"] == "lidar" else ("image",))


def _is_input(name: str, parts: Sequence[str], spec: Mapping[str, Any]) -> bool:
    return name in parts or (bool(spec.get("sweeps")) and is_sweep_part(name))


def _build_frames(tensors: Mapping[str, Any], spec: Mapping[str, Any]) -> list[RawFrame]:
    parts = _parts(spec)
    several = tensors.get("frame")
    if len(parts) == 1 and set(tensors) == {"frame"} and isinstance(several, list):
        return [RawFrame(body) for body in several]
    unknown = {name for name in tensors if not _is_input(name, parts, spec)}
    if unknown or not tensors:
        raise BadRequest(
            f"this model takes {', '.join(parts)}{', or frame' if len(parts) == 1 else ''}; the request has "
            f"{', '.join(sorted(tensors)[:8]) or 'no input'}"
        )
    bodies = {name: _build_part(name, tensor, spec) for name, tensor in tensors.items()}
    if len(bodies) > 1 and any(map(is_sweep_part, bodies)):
        # The shapes of tensors declare their columns.
        is_declared = isinstance(tensors.get("points"), np.ndarray)
        return [RawFrame(bodies, {"load_dim": int(spec.get("load_dim") or 4)} if is_declared else {})]
    if len(parts) == 1:
        (only,) = bodies.values()
        # The shape of a tensor declares its columns; an empty point cloud must declare num_points=0.
        declared = (
            {"load_dim": int(spec.get("load_dim") or 4)} if isinstance(tensors[parts[0]], np.ndarray) else {}
        )
        empty = {"num_points": 0} if not len(only) else {}
        return [RawFrame(only, {**declared, **empty} if parts == ("points",) else {})]
    body: Body = bodies
    return [RawFrame(body)]


def _build_part(name: str, tensor: npt.NDArray[Any] | list[Bytes], spec: Mapping[str, Any]) -> Bytes:
    if isinstance(tensor, list):
        if len(tensor) != 1:
            raise BadRequest(f"input {name} must have one element; use input 'frame' for several frames")
        return tensor[0]
    if name == "points" or name.startswith("sweep."):
        described = spec if name == "points" else spec.get("sweeps") or spec
        load_dim = int(described.get("load_dim") or 4)
        if tensor.dtype != np.float32 or tensor.ndim != 2 or tensor.shape[1] != load_dim:
            raise UndecodableFrame(
                f"{name[:80]} must be FP32 [N, {load_dim}], not {tensor.dtype} {list(tensor.shape)}"
            )
        return np.ascontiguousarray(tensor).tobytes()
    if name.startswith("image"):
        return encode_pixels(name, tensor)
    raise UndecodableFrame(f"{name} must be BYTES [1]")


def _output_kinds(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    boxes, scores, labels = _BOXES[3 if spec.get("box_type_3d") else 2]
    return {
        boxes: {"datatype": "FP32", "shape": [-1, -1]},
        scores: {"datatype": "FP32", "shape": [-1]},
        labels: {"datatype": "INT64", "shape": [-1]},
        "num_detections": {"datatype": "INT64", "shape": [-1]},
        "detections": {"datatype": "BYTES", "shape": [-1]},
    }


def encode_infer(
    request: InferRequest, bodies: Sequence[Bytes], name: str, version: str, spec: Mapping[str, Any]
) -> tuple[bytes, int | None]:
    """Encode the response; returns its body, and the length of its JSON header if binary tensors follow.

    Args:
        request: the request.
        bodies: JSON answers, one per frame.
        name: name of the model.
        version: version of the model.
        spec: description of the model.
    """
    tensors = _build_outputs(bodies, spec)
    requested = request.outputs or dict.fromkeys(tensors, request.binary)
    entries: list[dict[str, Any]] = []
    payloads: list[bytes] = []
    for output, binary in requested.items():
        datatype, shape, value = tensors[output]
        entry: dict[str, Any] = {"name": output, "datatype": datatype, "shape": shape}
        if binary:
            raw = _pack_bytes(value) if isinstance(value, list) else value.tobytes()
            payloads.append(raw)
            entry["parameters"] = {"binary_data_size": len(raw)}
        else:
            entry["data"] = (
                [bytes(item).decode() for item in value] if isinstance(value, list) else value.ravel()
            )
        entries.append(entry)
    document = {"model_name": name, "model_version": version, "outputs": entries}
    if request.id is not None:
        document["id"] = request.id
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([header, *payloads]), len(header) if payloads else None


def _build_outputs(
    bodies: Sequence[Bytes], spec: Mapping[str, Any]
) -> dict[str, tuple[str, list[int], npt.NDArray[Any] | list[Bytes]]]:
    names = _BOXES[3 if spec.get("box_type_3d") else 2]
    try:
        answers = [orjson.loads(body) for body in bodies]
    except orjson.JSONDecodeError as error:
        raise BackendBroken(f"the worker's answer is not JSON: {error}") from None
    # A model without boxes (segmentation) has its answer in `detections` only.
    boxes, scores, labels = ([answer.get(name, []) for answer in answers] for name in names)
    width = max((len(box) for frame in boxes for box in frame), default=4 if names[0] == "bboxes" else 7)
    flat = np.array([box for frame in boxes for box in frame], dtype="<f4").reshape(-1, width)
    total = len(flat)
    return {
        names[0]: ("FP32", [total, width], flat),
        names[1]: ("FP32", [total], np.array([s for frame in scores for s in frame], dtype="<f4")),
        names[2]: ("INT64", [total], np.array([label for frame in labels for label in frame], dtype="<i8")),
        "num_detections": ("INT64", [len(bodies)], np.array([len(frame) for frame in boxes], dtype="<i8")),
        "detections": ("BYTES", [len(bodies)], list(bodies)),
    }


def _pack_bytes(elements: Sequence[Bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + bytes(element) for element in elements)
