"""What both handlers do: load an archive at start, prove it on its golden frame, answer rows.

The life of a worker: `initialize`, then `handle` for every batch that comes through TorchServe, and `answer_batch` for
every one that comes directly (`serve.worker.server`). All frames of a call go through the network together; each
gets its own status. One thread computes, whoever asks, so that the next batch is read and decoded meanwhile. Knows
nothing about one modality: the archive does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from serve import ops
from serve.errors import ArchiveError, ServeError
from serve.protocol.frames import encode_json
from serve.settings import Settings
from serve.worker.cpu_quota import available_cores
from serve.worker.log_filters import install_log_filters
from serve.worker.rows import Entry, Form, answer_row, read_batch, read_row
from serve.worker.server import listen
from serve.worker.watchdog import watchdog

if TYPE_CHECKING:
    import torch

__all__ = ["DetectionHandler"]

logger = logging.getLogger(__name__)


class DetectionHandler:
    """A TorchServe handler for archives of one OpenMMLab package."""

    package: ClassVar[str]

    def initialize(self, context: Any) -> None:
        """Load the unpacked archive; raises a `SetupError` that says why when it cannot be served."""
        install_log_filters()
        self.settings = Settings.from_environment()
        ops.install(self.settings.ops, cache_dir=self.settings.cache_dir)
        from serve.runtime import device_for
        from serve.runtime.malloc import disable_malloc_trim

        device = device_for(context.system_properties.get("gpu_id"))
        if device.type == "cpu" and self.settings.keep_heap:
            disable_malloc_trim()  # before there is a second thread, which would get memory of its own
        # Loads and computes: what torch and its kernels keep per thread (pools, the current device) is kept once.
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._engine.submit(self._load, Path(context.system_properties["model_dir"]), device).result()
        if self.settings.worker_sockets is not None:
            listen(self.settings.worker_sockets, self.answer_batch)

    def _load(self, model_dir: Path, device: torch.device) -> None:
        import torch

        from serve.archive import open_directory
        from serve.runtime import load_detector
        from serve.runtime.selftest import self_test

        torch.set_num_threads(self.settings.threads or min(torch.get_num_threads(), available_cores()))
        archive = open_directory(model_dir)
        if archive.metadata.package != self.package:
            raise ArchiveError(
                f"the archive holds a {archive.metadata.modality} model of {archive.metadata.package}, this handler "
                f"serves {self.package}"
            )
        self.detector = load_detector(archive, device, trust_code=self.settings.trust_archive_code)
        self.self_test_s = self_test(self.detector, archive)
        logger.info(
            "%s %s is ready on %s with %s kernels; its golden frame came out as recorded in %.2f s",
            archive.metadata.name, archive.metadata.version, device, ops.kernels_in_use(), self.self_test_s,
        )  # fmt: skip

    def handle(self, data: Sequence[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer every row; one row's mistake never touches another."""
        if context.get_request_header(0, "describe") == "True":
            return [encode_json(self.describe())]  # TorchServe asks this alone, never among predictions
        # 1. Read the rows and decode their frames.
        started = time.perf_counter()
        rows: list[tuple[Form, list[Any]]] = []
        for i, row in enumerate(data):
            try:
                request = read_row(row, context.get_all_request_header(i))
                rows.append((request.form, [self._decode(entry) for entry in request.entries]))
            except ServeError as error:
                rows.append(("frame", [error]))
        # 2. One call for all frames that could be decoded.
        found, seconds = self._settled([item for _, items in rows for item in items], started)
        outcomes = iter(found)
        # 3. Answer in order.
        answers = []
        for i, (form, items) in enumerate(rows):
            own = [next(outcomes) for _ in items]
            status, content_type, body = answer_row(form, own, context.get_request_id(i), seconds)
            # TorchServe counts characters but sends bytes: phrases must be ASCII.
            context.set_response_status(status, HTTPStatus(status).phrase, i)
            context.set_response_header(i, "content-type", content_type)
            answers.append(body)
        return answers

    def answer_batch(self, body: memoryview, compute_s: int = 0) -> bytes:
        """Framed frames to framed outcomes; from any thread.

        Args:
            body: the frames.
            compute_s: seconds after which the worker ends itself if it still computes them; 0: none.

        Raises:
            ServeError: it is not a framed batch.
            Exception: what the network raised.
        """
        started = time.perf_counter()
        settled, seconds = self._settled(
            [self._decode(entry) for entry in read_batch(body)], started, compute_s
        )
        return answer_row("outcomes", settled, None, seconds)[2]

    def _settled(
        self, items: Sequence[Any], started: float, compute_s: int = 0
    ) -> tuple[list[Any], dict[str, float]]:
        """An outcome per frame, of other items what is wrong with them; and what was spent since `started`, seconds."""
        decoded = time.perf_counter()
        frames = [item for item in items if not isinstance(item, ServeError)]
        found, inference_s = self._engine.submit(self._infer, frames, compute_s).result()
        outcomes = iter(found)
        settled = [item if isinstance(item, ServeError) else next(outcomes) for item in items]
        return settled, {"decode": decoded - started, "inference": inference_s}

    def _infer(self, frames: Sequence[Any], compute_s: int) -> tuple[Sequence[Any], float]:
        """The frames' outcomes, and how long the network took, seconds; in the engine's thread."""
        began = time.perf_counter()
        with watchdog(compute_s):
            return self.detector.run(frames), time.perf_counter() - began

    def describe(self) -> dict[str, Any]:
        """What the served archive says of itself, and where it runs: the management API's ``?customized=true``."""
        return {
            **self.detector.describe(),
            "self_test": {"passed": True, "seconds": self.self_test_s},
            "kernels": ops.kernels_in_use(),
        }

    def _decode(self, entry: Entry) -> Any:
        if isinstance(entry, ServeError):
            return entry
        body, options = entry
        try:
            return self.detector.decode(body, options, self.settings.limits)
        except ServeError as error:
            return error
