"""Verify an archive over a TorchServe of its own, as ``mmdet3d-serve verify`` does."""

from __future__ import annotations

import contextlib
import shutil
import socket
from pathlib import Path
from typing import Any

from serve import archive
from serve.client import Client
from serve.settings.environment import variable_set
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.verify.endpoint import Reference, verify

__all__ = ["free_ports", "verify_served"]

_TIMEOUT_S = 600  # a worker on a busy machine may take longer than the default's 120


def verify_served(path: Path, opened: archive.Archive, reference: Reference, folder: Path) -> Any:
    """Serve an archive, send it its golden frame and compare with the reference, without a score threshold.

    Args:
        path: the archive.
        opened: the same, unpacked.
        reference: the native model.
        folder: folder for the frame's files.

    Returns:
        The comparison.

    Raises:
        BackendStartError: TorchServe cannot load the archive.
        ServeError: the server, or one side, cannot answer.
    """
    frame = _write_frame(opened, folder)
    inference, management, metrics = free_ports(3)
    options = TorchServeOptions(
        model_store=path.parent,
        models=[ServedModel(path.name)],
        inference_port=inference,
        management_port=management,
        metrics_port=metrics,
        response_timeout_s=_TIMEOUT_S,
        startup_timeout_s=_TIMEOUT_S,
        system_metrics=False,
    )
    with (
        variable_set("MMDET3D_SERVE_TRUST_ARCHIVE_CODE", "1"),
        TorchServe(options),
        Client(f"127.0.0.1:{inference}", timeout_s=_TIMEOUT_S) as client,
    ):
        (report,) = verify([frame], reference, client, opened.metadata.name, score_thr=0.0)
    return report.comparison


def _write_frame(opened: archive.Archive, folder: Path) -> Path:
    """Copy the golden frame to where `verify` finds frames: a file, or a folder with one file per part."""
    entries = opened.metadata.golden_frame
    if isinstance(entries, str):
        return opened.root / entries
    folder.mkdir()
    for part, entry in entries.items():
        shutil.copy(opened.root / entry, folder / f"{part}{Path(entry).suffix}")
    return folder


def free_ports(count: int) -> list[int]:
    """Choose different ports of 127.0.0.1 on which nothing listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
