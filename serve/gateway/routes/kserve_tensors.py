"""Objects of the Open Inference Protocol's requests, within bounds: their parameters and tensors, JSON or binary.

Sources: kserve/open-inference-protocol, ``specification/protocol/inference_rest.md``; triton-inference-server/server,
``docs/protocol/extension_binary_data.md``, ``…_classification.md`` and ``…_shared_memory.md``, the last two of which
are refused.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import BadRequest, FrameTooLarge, UnknownOption, quote
from serve.protocol.batch import MAX_NAME_CHARS, MAX_PARTS, Bytes
from serve.protocol.json_reader import JsonBounds, LongText, decode_base64, decode_text
from serve.protocol.option_places import REQUEST_OPTIONS, TRACK_OPTIONS
from serve.protocol.options import FrameOptions

__all__ = [
    "DATATYPES",
    "MAX_TEXT_CHARS",
    "OPTIONS",
    "REFUSED_OPTIONS",
    "InferBounds",
    "Tensor",
    "check_members",
    "pack_bytes",
    "read_flag",
    "read_name",
    "read_object",
    "read_objects",
    "read_parameters",
    "read_tensor",
]

#: A tensor that was read: the elements of BYTES, or an array.
Tensor = npt.NDArray[Any] | list[Bytes]
_NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
#: Datatypes of tensors that are read.
DATATYPES = (*_NUMPY, "BYTES")
_MAX_RANK = 8
_MAX_PARAMETERS = 64
#: Longest id of a request, and longest text among its parameters.
MAX_TEXT_CHARS = 4096
#: Options of ``/predictions`` that this protocol has no use for, and what their error says.
REFUSED_OPTIONS: Mapping[str, str] = {
    "fields": "fields is for /predictions; here, name the wanted tensors in outputs",
    **{
        name: f"{name} is for /predictions; the Open Inference Protocol has no such option"
        for name in ("camera", *TRACK_OPTIONS)
    },
}
#: Options that are parameters of a request.
OPTIONS = tuple(
    name
    for name in (*(each.name for each in fields(FrameOptions)), *REQUEST_OPTIONS)
    if name not in REFUSED_OPTIONS
)


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


def read_object(value: Any, what: str) -> Mapping[str, Any]:
    """Return an object of a request, `what` in messages.

    Raises:
        BadRequest: it is none.
    """
    if not isinstance(value, dict):
        raise BadRequest(f"not a request of the Open Inference Protocol: {what} must be an object")
    return value


def read_objects(document: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """Return the objects that a request lists under `name`; none if it is missing or null.

    Raises:
        BadRequest: it is no list of objects, or too long.
    """
    listed = document.get(name)
    if listed is None:
        return []
    if not isinstance(listed, list) or len(listed) > MAX_PARTS:
        raise BadRequest(f"{name} must be a list of at most {MAX_PARTS} objects")
    return [read_object(entry, f"an entry of {name}") for entry in listed]


def read_name(entry: Mapping[str, Any]) -> str:
    """Return the name of a tensor.

    Raises:
        BadRequest: it has none, or too long a one.
    """
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise BadRequest(f"a tensor needs a name of 1 to {MAX_NAME_CHARS} characters, got {quote(name)}")
    return name


def read_parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of a request or tensor: by the protocol texts, numbers or booleans.

    Raises:
        BadRequest: they are no object, or too many.
        UnknownOption: one has a value of another type, or too long a text.
    """
    parameters = read_object(entry.get("parameters") or {}, "parameters")
    if len(parameters) > _MAX_PARAMETERS:
        raise BadRequest(f"{len(parameters)} parameters, the limit is {_MAX_PARAMETERS}")
    for name, value in parameters.items():
        if not isinstance(value, str | int | float | bool) or (
            isinstance(value, str) and len(value) > MAX_TEXT_CHARS
        ):
            raise UnknownOption(
                f"parameter {quote(name)} must be a number, a boolean, or a text of at most {MAX_TEXT_CHARS} "
                "characters"
            )
    return parameters


def read_flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a parameter that is true or false.

    Raises:
        UnknownOption: it is something else.
    """
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise UnknownOption(f"parameter {name} must be true or false, got {quote(value)}")
    return value


def check_members(names: Iterable[str], what: str) -> None:
    """Check that nothing is asked for where it would have no effect.

    Args:
        names: names of the members, or of the parameters, of `what`.
        what: a part of a request, for messages.

    Raises:
        UnknownOption: an option, which belongs into the parameters of the request or is for ``/predictions``.
        BadRequest: an extension of the protocol that this server does not have.
    """
    for name in names:
        if name in REFUSED_OPTIONS:
            raise UnknownOption(REFUSED_OPTIONS[name])
        if name in OPTIONS:
            raise UnknownOption(f"{name} has no effect in {what}; put it into the parameters of the request")
        if name.startswith("shared_memory"):
            raise BadRequest(
                "shared memory is not supported; send tensors in requests and take them from answers"
            )
        if name == "classification":
            raise BadRequest(
                "classification is not supported; names of classes are in the output 'detections'"
            )


def read_tensor(
    name: str, tensor: Mapping[str, Any], rest: memoryview, bounds: InferBounds
) -> tuple[Tensor, memoryview]:
    """Read one input tensor; returns it and the rest of the binary part.

    Args:
        name: of the tensor.
        tensor: what the request says of it.
        rest: the part of the body that is binary and not read yet.
        bounds: on its elements and bytes.

    Raises:
        BadRequest: it is no tensor, or its data does not fit its shape.
        FrameTooLarge: it is beyond `bounds`.
    """
    datatype, parameters = tensor.get("datatype"), read_parameters(tensor)
    check_members(parameters, f"the parameters of input {name}")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
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


def pack_bytes(elements: Sequence[Bytes]) -> bytes:
    """Pack a BYTES tensor, as `_split_bytes` reads it."""
    return b"".join(struct.pack("<I", len(element)) + bytes(element) for element in elements)
