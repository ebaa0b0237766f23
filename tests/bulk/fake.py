"""Models for processes of a bulk run: they echo, and a frame can end the process or stop it at a gate."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
            gate.with_suffix(".reached").touch()
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


def open_echo(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    return BulkModel()


def open_slow(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    return _SlowModel()


class _SlowModel(BulkModel):
    """Takes four milliseconds for each frame."""

    def _answer(self, body: Any) -> Any:
        time.sleep(0.004)
        return super()._answer(body)


def open_dying(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    os._exit(9)


def open_broken(archive: Path, device: str, *, trust_code: bool, threads: int) -> BulkModel:
    raise SetupError(f"{archive} cannot be loaded")
