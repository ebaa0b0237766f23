"""Fake TorchServe: its management API and framed predictions, with failures on demand.

Answers of its models name the frame they are for, so that a mix-up shows.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import orjson

from serve.protocol.batch import OUTCOMES_CONTENT_TYPE, Outcomes, pack_outcomes, unpack_frames

CLOUDS = {
    "modality": "lidar",
    "parts": ["points"],
    "load_dim": 4,
    "box_type_3d": "LiDAR",
    "classes": ["Car", "Pedestrian"],
    "package": "mmdet3d",
    "self_test": {"passed": True, "seconds": 0.1},
}
IMAGES = {
    **CLOUDS,
    "modality": "image",
    "parts": ["image"],
    "load_dim": None,
    "box_type_3d": None,
    "package": "mmdet",
}
FUSION = {**CLOUDS, "modality": "fusion", "parts": ["points", "image", "calibration"]}

SWEEPS = {
    **CLOUDS,
    "load_dim": 5,
    "columns": ["x", "y", "z", "intensity", "ring"],
    "sweeps": {"number": 10, "load_dim": 5, "time_column": 4, "repeats": False},
    "warnings": [{"code": "one_sweep", "message": "no sweeps"}],
}


class CutOff(Exception):
    """Ends an answer in its middle: uvicorn then closes the connection."""


@dataclass
class FakeModel:
    """One version of a model.

    `alter` changes the answer of every frame, `trouble` fails every call, and `gate` stops them until it is opened. A
    frame whose options name one of `unknown_classes` is an unknown option.
    """

    spec: Any = field(default_factory=lambda: dict(CLOUDS))
    workers: list[int] = field(default_factory=lambda: [4711])
    ready: int | None = None
    default: bool = True
    alter: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    trouble: str = ""
    unknown_classes: frozenset[str] = frozenset()
    gate: asyncio.Event | None = None
    calls: list[int] = field(default_factory=list)  # frames of each

    def described(self, name: str, version: str) -> dict[str, Any]:
        ready = len(self.workers) if self.ready is None else self.ready
        workers = [
            {"id": f"90{i:02}", "pid": pid, "status": "READY" if i < ready else "UNLOADING"}
            for i, pid in enumerate(self.workers)
        ]
        return {"modelName": name, "modelVersion": version, "workers": workers}


def answer_for(frame: bytes | dict[str, bytes], options: dict[str, Any]) -> bytes:
    """What a frame is answered with; depends on all of its bytes and options.

    Frames have one to three detections, and these differ, so that an order which is lost shows.
    """
    whole = frame if isinstance(frame, bytes) else b"".join(frame[name] for name in sorted(frame))
    digest = hashlib.sha256(whole).hexdigest()
    numbers = hashlib.sha256(whole).digest()
    count = 1 + numbers[0] % 3
    answer = {
        "bboxes_3d": [[float(byte) for byte in numbers[7 * k : 7 * k + 7]] for k in range(count)],
        "scores_3d": [0.5 - k / 8 for k in range(count)],
        "labels_3d": [1 - k % 2 for k in range(count)],
        "names": [["Car", "Pedestrian"][1 - k % 2] for k in range(count)],
        "box_type_3d": "LiDAR",
        "frame": digest,
        "options": options,
    }
    return orjson.dumps(answer)


class FakeTorchServe:
    """An ASGI application. Belongs to the loop that serves it; plain attributes may be set from any thread."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, FakeModel]] = {"second": {"1.0": FakeModel()}}
        self.calls: list[list[bytes]] = []
        self.tokens: dict[str, str] | None = None
        self.troubles: deque[str] = deque()
        self.undescribed: deque[str] = deque()  # messages of 500 in place of descriptions
        self.most_frames: int | None = None
        self.observed: dict[str, Any] | None = None  # in the answer to every batch
        self.gate = asyncio.Event()
        self.gate.set()
        self.held = 0
        self.gated_frames: set[bytes] = set()
        self.looks = 0
        self.hang = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", scope["type"]
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = [unquote(part) for part in scope["raw_path"].decode().split("/")[1:]]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        use = "inference" if path[0] == "predictions" else "management"
        if self.tokens is not None and headers.get("authorization") != f"Bearer {self.tokens[use]}":
            reply = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
            await _send(send, 400, {"code": 400, "type": "InvalidKeyException", "message": reply})
        elif use == "management":
            await self._manage(path[1:], b"customized=true" in scope["query_string"], send)
        else:
            await self._predict(path[1:], headers, bytes(body), send)

    async def _manage(self, path: list[str], customized: bool, send: Any) -> None:
        if self.hang:
            await asyncio.Event().wait()
        if not path:
            self.looks += 1
            listed = [{"modelName": name, "modelUrl": f"{name}.mar"} for name in self.models]
            await _send(send, 200, {"models": listed})
            return
        versions = self.models.get(path[0])
        wanted = [version for version, model in (versions or {}).items() if model.default]
        if len(path) > 1:
            wanted = [*versions] if path[1] == "all" and versions else [path[1]]
        if versions is None or any(version not in versions for version in wanted):
            reply = {"code": 404, "type": "ModelNotFoundException", "message": f"Model not found: {path[0]}"}
            await _send(send, 404, reply)
            return
        entries = [versions[version].described(path[0], version) for version in wanted]
        if customized and self.undescribed:
            message = self.undescribed.popleft()
            await _send(send, 500, {"code": 500, "type": "InternalServerException", "message": message})
            return
        if customized:
            spec = versions[wanted[0]].spec
            entries[0]["customizedMetadata"] = spec if isinstance(spec, str) else json.dumps(spec)
        await _send(send, 200, entries)

    async def _predict(self, path: list[str], headers: dict[str, str], body: bytes, send: Any) -> None:
        name, version = path
        assert headers["accept"] == OUTCOMES_CONTENT_TYPE, headers
        frames = [
            (
                bytes(frame) if not isinstance(frame, dict) else {k: bytes(v) for k, v in frame.items()},
                options,
            )
            for frame, options in unpack_frames(body)
        ]
        self.calls.append(
            [frame if isinstance(frame, bytes) else b"".join(frame.values()) for frame, _ in frames]
        )
        if version not in self.models.get(name, {}):
            await _send(
                send, 404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found"}
            )
            return
        if not self.gate.is_set() and (not self.gated_frames or self.gated_frames & {*self.calls[-1]}):
            self.held += 1
            await self.gate.wait()
            self.held -= 1
        if self.most_frames is not None and len(frames) > self.most_frames:
            await _send(
                send, 507, {"code": 507, "type": "InternalServerException", "message": "CUDA out of memory"}
            )
            return
        items = [
            (422, b'{"error":{"code":"undecodable_frame","message":"bad frame"}}')
            if frame == b"bad!"
            else (200, answer_for(frame, options))
            for frame, options in frames
        ]
        model = self.models[name][version]
        model.calls.append(len(frames))
        for k, (_, options) in enumerate(frames):
            if model.unknown_classes & {*options.get("classes", ())}:
                items[k] = 400, b'{"error":{"code":"unknown_option","message":"no such class"}}'
        if model.alter is not None:
            items = [(status, orjson.dumps(model.alter(orjson.loads(body)))) for status, body in items]
        if model.gate is not None:
            await model.gate.wait()
        trouble = model.trouble or (self.troubles.popleft() if self.troubles else "")
        outcomes = pack_outcomes(Outcomes(items, {"decode": 0.001, "inference": 0.002}, self.observed))
        kind = OUTCOMES_CONTENT_TYPE
        if trouble == "worker died":
            await _send(
                send, 500, {"code": 500, "type": "InternalServerException", "message": "Worker died."}
            )
            return
        if trouble == "worker killed":
            await _send(
                send, 507, {"code": 507, "type": "InternalServerException", "message": "Worker died."}
            )
            return
        if trouble == "strange refusal":
            await _send(send, 400, {"code": 400, "type": "BadRequestException", "message": "what is this?"})
            return
        if trouble == "queue full":
            reply = 'Model "second" has no worker to serve inference request. Please use scale workers API'
            await _send(send, 503, {"code": 503, "type": "ServiceUnavailableException", "message": reply})
            return
        if trouble == "short answer":
            outcomes = pack_outcomes(Outcomes(items[:-1]))
        elif trouble == "garbage":
            outcomes = b"\x00" * 50
        elif trouble == "another type":
            kind = "application/json"
        elif trouble == "no json":
            outcomes = pack_outcomes(Outcomes([(200, b"\xff{") for _ in items]))
        length = len(outcomes) + (trouble == "cut off") * 100
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", kind.encode()), (b"content-length", b"%d" % length)],
            }
        )
        if trouble == "cut off":
            await send({"type": "http.response.body", "body": outcomes[:10], "more_body": True})
            raise CutOff
        await send({"type": "http.response.body", "body": outcomes})


async def _send(send: Any, status: int, document: Any) -> None:
    body = orjson.dumps(document)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
