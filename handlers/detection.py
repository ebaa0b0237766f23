"""What both handlers do: load an archive at start, prove it on its golden frame, answer rows.

The life of a worker: `initialize`, then `handle` for every batch TorchServe forms. All rows of a call go
through the network together; each gets its own status. Knows nothing about one modality: the archive does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

from handlers.rows import Entry, answer_row, read_row
from serve import ops
from serve.errors import ArchiveError, ServeError
from serve.settings import Settings

__all__ = ["DetectionHandler"]

logger = logging.getLogger(__name__)


class DetectionHandler:
    """A TorchServe handler for archives of one modality."""

    modality: ClassVar[str]

    def initialize(self, context: Any) -> None:
        """Load the unpacked archive; raises a `SetupError` that says why when it cannot be served."""
        self.settings = Settings.from_environment()
        ops.install(self.settings.ops)
        import torch

        from serve.archive import open_directory
        from serve.runtime import device_for, load_detector
        from serve.runtime.selftest import prove

        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        archive = open_directory(Path(context.system_properties["model_dir"]))
        if archive.metadata.modality != self.modality:
            raise ArchiveError(
                f"the archive holds a model of {archive.metadata.modality}, this handler serves {self.modality}"
            )
        device = device_for(context.system_properties.get("gpu_id"))
        self.detector = load_detector(archive, device, trust_code=self.settings.trust_archive_code)
        seconds = prove(self.detector, archive)
        logger.info(
            "%s %s is ready on %s with %s kernels; its golden frame came out as recorded in %.2f s",
            archive.metadata.name, archive.metadata.version, device, ops.kernels_in_use(), seconds,
        )  # fmt: skip

    def handle(self, data: Sequence[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer every row; one row's mistake never touches another."""
        # 1. Read the rows and decode their frames.
        rows: list[tuple[bool, list[Any]]] = []
        for i, row in enumerate(data):
            try:
                request = read_row(row, context.get_all_request_header(i))
                rows.append((request.framed, [self._decode(entry) for entry in request.entries]))
            except ServeError as error:
                rows.append((False, [error]))
        # 2. One call for all frames that could be decoded.
        frames = [item for _, items in rows for item in items if not isinstance(item, ServeError)]
        outcomes = iter(self.detector.run(frames))
        # 3. Answer in order.
        answers = []
        for i, (framed, items) in enumerate(rows):
            settled = [item if isinstance(item, ServeError) else next(outcomes) for item in items]
            status, body = answer_row(framed, settled, context.get_request_id(i))
            # TorchServe counts characters but sends bytes: phrases must be ASCII.
            context.set_response_status(status, HTTPStatus(status).phrase, i)
            context.set_response_header(i, "content-type", "application/json")
            answers.append(body)
        return answers

    def _decode(self, entry: Entry) -> Any:
        if isinstance(entry, ServeError):
            return entry
        body, options = entry
        try:
            return self.detector.decode(body, options, self.settings.limits)
        except ServeError as error:
            return error
