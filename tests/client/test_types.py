"""What a type checker knows of the client: these functions fail `make lint`, not a run, if it knows less."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pytest

from serve.client import AsyncClient, Client, Result, encode_image
from serve.client.frames import encode_frame
from serve.errors import ServeError
from tests.client.test_protocol import running


async def names_of_many(client: AsyncClient, frames: list[bytes], *, is_lenient: bool) -> None:
    async for each in client.predict_many(frames, "images"):
        assert_type(each, Result)
    async for either in client.predict_many(frames, "images", return_errors=is_lenient):
        assert_type(either, Result | ServeError)


def test_results_of_many_frames_are_errors_only_if_asked_for() -> None:
    with running() as server, Client(server.address) as client:
        for each in client.predict_many([b"frame"], "images"):
            assert_type(each, Result)
            assert each.encoded
        for either in client.predict_many([b"frame"], "images", return_errors=True):
            assert_type(either, Result | ServeError)


def as_entry(path: Path) -> os.DirEntry[str]:
    with os.scandir(path.parent) as entries:
        return next(entries)


@pytest.mark.parametrize("kind", [Path, str, as_entry])
def test_path_of_any_kind_is_a_frame(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    image = encode_image(np.zeros((2, 3, 3), np.uint8))
    (tmp_path / "street.png").write_bytes(image)
    assert encode_frame(kind(tmp_path / "street.png")) == (image, "image/png")
