"""Codec of the Open Inference Protocol (KServe v2), REST: tensors in JSON or its binary extension ↔ frames, answers.

Source: kserve/open-inference-protocol, ``specification/protocol/inference_rest.md``, and Triton's
``extension_binary_data.md``.

The inputs of a model are its parts: ``points`` FP32 [N, load_dim], ``image`` BYTES [1] (an encoded image) or UINT8
[H, W, 3] RGB, ``calibration`` BYTES [1] (JSON). A model with one part also accepts ``frame`` BYTES [n]: n encoded
frames in one request. Optional inputs of a model of several sweeps are ``sweep.0``, ``sweep.1``, … FP32 [N, load_dim],
of which the metadata lists the first, and ``sweeps`` BYTES [1] (JSON). Outputs are concatenated over all frames;
`num_detections` holds the number of each frame.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image

from serve.errors import BackendBroken, BadRequest, UndecodableFrame
from serve.gateway.backend import EncodedFrame
from serve.protocol.batch import Body, Bytes
from serve.protocol.sweeps import is_sweep_part

__all__ = ["InferRequest", "decode_infer", "encode_infer", "model_metadata"]

_BOXES = {
    3: ("bboxes_3d", "scores_3d", "labels_3d"),
    2: ("bboxes", "scores", "labels"),
}
_NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
# Parameters of Triton's clients without a meaning here.
_IGNORED = {"binary_data_output", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout"}


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
    frames: Sequence[EncodedFrame]
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


def decode_infer(body: bytes, header_length: str | None, spec: Mapping[str, Any]) -> InferRequest:
    """Read a request; `header_length` is the ``Inference-Header-Content-Length`` header.

    Raises:
        BadRequest: the request violates the protocol, or does not fit the model.
        UndecodableFrame: a tensor is not a frame of this model.
    """
    if header_length is None:
        header, rest = body, memoryview(b"")
    elif re.fullmatch("[0-9]{1,12}", header_length) and int(header_length) <= len(body):
        header, rest = body[: int(header_length)], memoryview(body)[int(header_length) :]
    else:
        raise BadRequest(f"Inference-Header-Content-Length {header_length!r} does not fit the body")
    try:
        document = orjson.loads(header)
        inputs = document["inputs"]
        tensors: dict[str, npt.NDArray[Any] | list[Bytes]] = {}
        for tensor in inputs:
            tensors[str(tensor["name"])], rest = _read_tensor(tensor, rest)
        parameters = dict(document.get("parameters") or {})
        requested = document.get("outputs")
        binary = bool(parameters.get("binary_data_output", False))
        outputs = (
            None if not requested else {str(entry["name"]): _is_binary(entry, binary) for entry in requested}
        )
        identity = document.get("id")
        strings = {name: str(value) for name, value in parameters.items() if name not in _IGNORED}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, struct.error) as error:
        raise BadRequest(
            f"not a request of the Open Inference Protocol: {type(error).__name__}: {error}"
        ) from None
    if len(rest):
        raise BadRequest(f"{len(rest)} bytes follow the tensors that the header declares")
    unknown = set(outputs or ()) - set(_output_kinds(spec))
    if unknown:
        raise BadRequest(
            f"unknown output {sorted(unknown)[0]!r}; available: {', '.join(_output_kinds(spec))}"
        )
    return InferRequest(
        None if identity is None else str(identity), _build_frames(tensors, spec), strings, outputs, binary
    )


def _is_binary(entry: Mapping[str, Any], default: bool) -> bool:
    return bool((entry.get("parameters") or {}).get("binary_data", default))


def _read_tensor(
    tensor: Mapping[str, Any], rest: memoryview
) -> tuple[npt.NDArray[Any] | list[Bytes], memoryview]:
    """Read one input tensor; returns it and the rest of the binary part."""
    name, datatype = str(tensor["name"]), tensor["datatype"]
    shape = [int(length) for length in tensor["shape"]]
    if datatype != "BYTES" and datatype not in _NUMPY:
        raise ValueError(f"input {name} has the unknown datatype {datatype!r}")
    if any(length < 0 for length in shape):
        raise ValueError(f"input {name} has the shape {shape}")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if size is not None:
        if not isinstance(size, int) or not 0 <= size <= len(rest):
            raise ValueError(f"input {name} declares {size!r} bytes, {len(rest)} are left")
        data, rest = rest[:size], rest[size:]
        if datatype == "BYTES":
            return _split_bytes(data, count), rest
        if size != count * np.dtype(_NUMPY[datatype]).itemsize:
            raise ValueError(f"input {name} of shape {shape} and {datatype} cannot have {size} bytes")
        return np.frombuffer(data, _NUMPY[datatype]).reshape(shape), rest
    values = _flatten(tensor["data"])
    if len(values) != count:
        raise ValueError(f"input {name} of shape {shape} has {len(values)} values")
    if datatype == "BYTES":
        coded = (tensor.get("parameters") or {}).get("content_type") == "base64"
        return [_encode_text(name, value, coded) for value in values], rest
    return np.array(values, dtype=_NUMPY[datatype]).reshape(shape), rest


def _flatten(data: Any) -> list[Any]:
    """Flatten tensor data, which may be flat or nested in JSON."""
    while isinstance(data, list) and data and isinstance(data[0], list):
        data = [value for row in data for value in row]
    if not isinstance(data, list):
        raise ValueError("tensor data must be a list")
    return data


def _encode_text(name: str, value: Any, coded: bool) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"input {name}: elements of BYTES must be strings in JSON")
    if not coded:
        return value.encode()
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"input {name}: not base64: {error}") from None


def _split_bytes(data: memoryview, count: int) -> list[Bytes]:
    """Split a BYTES tensor into elements, each preceded by its length (uint32, little-endian)."""
    found: list[Bytes] = []
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        if at + 4 + length > len(data):
            raise ValueError("an element of BYTES is longer than the tensor")
        found.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    if len(found) != count:
        raise ValueError(f"BYTES tensor of {count} elements holds {len(found)}")
    return found


def _parts(spec: Mapping[str, Any]) -> tuple[str, ...]:
    parts = tuple(spec.get("parts") or ())
    return parts or (("points",) if spec["modality"] == "lidar" else ("image",))


def _is_input(name: str, parts: Sequence[str], spec: Mapping[str, Any]) -> bool:
    return name in parts or (bool(spec.get("sweeps")) and is_sweep_part(name))


def _build_frames(tensors: Mapping[str, Any], spec: Mapping[str, Any]) -> list[EncodedFrame]:
    parts = _parts(spec)
    several = tensors.get("frame")
    if len(parts) == 1 and set(tensors) == {"frame"} and isinstance(several, list):
        return [EncodedFrame(body) for body in several]
    unknown = {name for name in tensors if not _is_input(name, parts, spec)}
    if unknown or not tensors:
        raise BadRequest(
            f"this model takes {', '.join(parts)}{', or frame' if len(parts) == 1 else ''}; the request has "
            f"{', '.join(sorted(tensors)) or 'no input'}"
        )
    bodies = {name: _build_part(name, tensor, spec) for name, tensor in tensors.items()}
    if len(bodies) > 1 and any(map(is_sweep_part, bodies)):
        # The shapes of tensors declare their columns.
        is_declared = isinstance(tensors.get("points"), np.ndarray)
        return [EncodedFrame(bodies, {"load_dim": int(spec.get("load_dim") or 4)} if is_declared else {})]
    if len(parts) == 1:
        (only,) = bodies.values()
        # The shape of a tensor declares its columns; an empty point cloud must declare num_points=0.
        declared = (
            {"load_dim": int(spec.get("load_dim") or 4)} if isinstance(tensors[parts[0]], np.ndarray) else {}
        )
        empty = {"num_points": 0} if not len(only) else {}
        return [EncodedFrame(only, {**declared, **empty} if parts == ("points",) else {})]
    body: Body = bodies
    return [EncodedFrame(body)]


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
    if name.startswith("image") and tensor.dtype == np.uint8 and tensor.ndim == 3 and tensor.shape[2] == 3:
        stream = io.BytesIO()
        Image.fromarray(tensor).save(stream, "PNG", compress_level=1)
        return stream.getvalue()
    raise UndecodableFrame(f"{name} must be BYTES [1]{', or UINT8 [H, W, 3] RGB' * name.startswith('image')}")


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
