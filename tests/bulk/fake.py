"""Models for processes of a bulk run: they echo, and a frame can end the process or stop it at a gate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from serve.bulk.destination import Destination
from serve.bulk.parts import Counts, Job, Part, compute_part
from serve.errors import SetupError, UndecodableFrame
from serve.predict.models import outcome_of


class BulkModel:
    """Answers with the length of a frame; rejects ``bad``, ends its process at ``deadly``, waits at ``gate PATH``."""

    modality: Any = "lidar"
    load_dim = 4
    is_remote = False
    identity: Any = MappingProxyType({"name": "bulk", "version": "1.0"})
    description: Any = MappingProxyType({"modality": "lidar", "load_dim": 4})

    def prepare(self, body: Any, options: Any) -> bytes:
        if isinstance(body, Mapping):
            return b"".join(body[part] for part in sorted(body))
        if body == b"bad":
            raise UndecodableFrame("a bad frame")
        return bytes(body)

    def submit(self, prepared: Sequence[Future[Any]]) -> Future[list[Any]]:
        done: Future[list[Any]] = Future()
        done.set_result([self._answer(outcome_of(each)) for each in prepared])
        return done

    def _answer(self, body: Any) -> Any:
        if isinstance(body, Exception):
            return body
        if body == b"deadly":
            os._exit(9)
        if body.startswith(b"gate "):
            gate = Path(body[5:].decode())
            gate.with_suffix(".reached").write_text(str(os.getpid()))
            while not gate.exists():
                time.sleep(0.01)
        if body.startswith(b"once "):
            mark = Path(body[5:].decode())
            if not mark.exists():
                mark.touch()
                os._exit(9)
        return {"bboxes_3d": [], "scores_3d": [], "labels_3d": [], "names": ["Car"], "bytes": len(body)}

    def close(self) -> None:
        return


class OneProcess:
    """Engine that computes in the process of the test."""

    def compute(
        self, parts: Iterator[Part], job: Job, destination: Destination, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Counts]]:
        model = None
        for part in parts:
            model = model or job.open_model(Path(job.archive), "cpu", trust_code=False, threads=1)
            nothing = frozenset[int]()
            advance(0)
            yield (
                part.number,
                compute_part(
                    model, job, destination, part.number, part.lines, False, nothing, lambda count: None
                ),
            )


def open_echo(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    return BulkModel()


def open_lidar(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    return _LidarModel()


class _LidarModel(BulkModel):
    """Finds as many cars as a frame has bytes, at 10, 11, … metres ahead."""

    def _answer(self, body: Any) -> Any:
        answer = super()._answer(body)
        if isinstance(answer, Exception):
            return answer
        boxes = np.array([[10 + k, 0, -1.5, 4.1, 1.7, 1.6, 0.1] for k in range(len(body))], np.float32)
        return {
            "bboxes_3d": boxes.reshape(-1, 7),
            "scores_3d": np.linspace(0.9, 0.1, len(body), dtype=np.float32),
            "labels_3d": np.zeros(len(body), np.int64),
            "names": ["Car"] * len(body),
            "box_type_3d": "LiDAR",
            "classes": ["Car"],
            "units": {"length": "m"},
            "model": {"name": "fake", "version": "1.0"},
            "bytes": len(body),
        }


def open_image(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    return _ImageModel()


class _ImageModel(BulkModel):
    """Finds one donut per byte of a frame, with a mask."""

    modality: Any = "image"

    def _answer(self, body: Any) -> Any:
        answer = super()._answer(body)
        if isinstance(answer, Exception):
            return answer
        count = len(body)
        return {
            "bboxes": np.array([[k, 1.25, k + 2.5, 3] for k in range(count)], np.float32).reshape(-1, 4),
            "scores": np.linspace(0.9, 0.1, count, dtype=np.float32),
            "labels": np.ones(count, np.int64),
            "names": ["donut"] * count,
            "masks": [{"size": [4, 4], "counts": "25O3"}] * count,
            "classes": ["cake", "donut"],
            "warnings": [{"code": "odd", "message": "an odd one"}] if count > 3 else [],
        }


def open_slow(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    return _SlowModel()


class _SlowModel(BulkModel):
    """Takes four milliseconds for each frame."""

    def _answer(self, body: Any) -> Any:
        time.sleep(0.004)
        return super()._answer(body)


def open_dying(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    os._exit(9)


def open_short_of_memory(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    raise MemoryError("failed to map a library")


def open_broken(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    raise SetupError(f"{archive} cannot be loaded")
