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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from serve.errors import BackendBroken, BadRequest, UndecodableFrame, quote
from serve.gateway.routes.kserve_tensors import (
    MAX_TEXT_CHARS,
    InferBounds,
    Tensor,
    check_members,
    pack_bytes,
    read_flag,
    read_name,
    read_object,
    read_objects,
    read_parameters,
    read_tensor,
)
from serve.gateway.routes.pixels import encode_pixels
from serve.protocol.batch import Body, Bytes, RawFrame
from serve.protocol.json_reader import read_json
from serve.protocol.sweeps import is_sweep_part

__all__ = ["InferRequest", "decode_infer", "encode_infer", "json_bytes", "model_metadata"]

_BOXES = {
    3: ("bboxes_3d", "scores_3d", "labels_3d"),
    2: ("bboxes", "scores", "labels"),
}
# Parameters that Triton reserves for itself (``extension_parameters.md``), without a meaning here; and the codec of all
# inputs that MLServer's clients name, in place of which their datatypes count.
_RESERVED = {
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "priority",
    "timeout",
    "headers",
    "content_type",
}
_RESERVED_PREFIX = "triton_"


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
    document = read_object(read_json(header, bounds.json), "the request")
    check_members(document, "the request itself")
    tensors: dict[str, Tensor] = {}
    for tensor in read_objects(document, "inputs"):
        name = read_name(tensor)
        if name in tensors:
            raise BadRequest(f"input {quote(name)} is given twice")
        tensors[name], rest = read_tensor(name, tensor, rest, bounds)
    if len(rest):
        raise BadRequest(f"{len(rest)} bytes follow the tensors that the header declares")
    parameters = read_parameters(document)
    binary = read_flag(parameters, "binary_data_output", False)
    outputs = _read_outputs(document, binary, spec)
    identity = document.get("id")
    if identity is not None and (not isinstance(identity, str | int) or len(str(identity)) > MAX_TEXT_CHARS):
        raise BadRequest(f"the id must be a text of at most {MAX_TEXT_CHARS} characters")
    return InferRequest(
        None if identity is None else str(identity),
        _build_frames(tensors, spec),
        {name: str(value) for name, value in parameters.items() if not _is_of_protocol(name)},
        outputs or None,
        binary,
    )


def _read_outputs(document: Mapping[str, Any], binary: bool, spec: Mapping[str, Any]) -> dict[str, bool]:
    """Read which outputs are wanted, and whether each is binary."""
    found: dict[str, bool] = {}
    for entry in read_objects(document, "outputs"):
        name, parameters = read_name(entry), read_parameters(entry)
        if name not in _output_kinds(spec):
            raise BadRequest(f"unknown output {quote(name)}; available: {', '.join(_output_kinds(spec))}")
        if name in found:
            raise BadRequest(f"output {name} is asked for twice")
        check_members(parameters, f"the parameters of output {name}")
        found[name] = read_flag(parameters, "binary_data", binary)
    return found


def _is_of_protocol(name: str) -> bool:
    """Whether a parameter is the protocol's or another server's, rather than an option of a frame."""
    return name == "binary_data_output" or name in _RESERVED or name.startswith(_RESERVED_PREFIX)


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


def _build_part(name: str, tensor: Tensor, spec: Mapping[str, Any]) -> Bytes:
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
            raw = pack_bytes(value) if isinstance(value, list) else value.tobytes()
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
