"""Addresses of Ray clusters: what is none, or has none behind it, ends with status 2 and a sentence, and soon."""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from serve.bulk.ray_engine import RayEngine
from serve.errors import SettingsError, SetupError
from tests.bulk.on_ray import WARNINGS, command, run

pytestmark = WARNINGS


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "model.mar"
    path.write_bytes(b"an archive")
    return path


@pytest.mark.parametrize(
    "address",
    [
        "ray://127.0.0.1:10001",
        "http://127.0.0.1:8265",
        "head",
        "head:",
        ":6379",
        "head:x",
        "head:0",
        "head:65536",
        " ",
    ],
)
def test_what_is_no_address_is_an_error_before_anything_is_read(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError):
        RayEngine(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    for given in (None, "auto"):
        with pytest.raises(SettingsError):
            RayEngine(given)
    RayEngine("head:6379")  # which is preferred


def test_an_address_without_a_cluster_is_an_error_at_once(frames: Any, archive: Path, tmp_path: Path) -> None:
    source, began = frames(b"1"), time.monotonic()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "[::1]:1", "nothing.invalid:6379"):
            with pytest.raises(SetupError):
                run(source, tmp_path / "out", RayEngine(address), archive)
    assert time.monotonic() - began < 30


def test_a_machine_without_a_cluster_is_an_error(frames: Any, archive: Path, tmp_path: Path) -> None:
    with command(frames(b"1"), tmp_path / "out", archive, "auto", RAY_TMPDIR=str(tmp_path)) as process:
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and printed.startswith("error: ") and printed.count("\n") == 1


def test_a_port_that_is_not_a_clusters_is_an_error(frames: Any, archive: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:  # accepts, and says nothing
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with command(
            frames(b"1"), tmp_path / "out", archive, address, RAY_py_gcs_connect_timeout_s="2"
        ) as process:
            printed = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and printed.startswith("error: ") and printed.count("\n") == 1


def test_a_temporary_folder_too_deep_for_sockets_is_an_error(
    frames: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(SetupError, match="TMPDIR"):
        run(frames(b"1"), tmp_path / "out", RayEngine("local"), archive)
    assert not list(deep.iterdir())
