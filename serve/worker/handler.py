"""Common TorchServe handler: loads an archive, checks it on its golden frame, and answers requests.

`initialize` runs once; `handle` answers a batch that comes through TorchServe, `answer_batch` one that comes through
the worker's socket (`serve.worker.server`). All frames of a batch run through the network together, and each has its
own status. A single thread computes, so that the next batch is read and decoded meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
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
    """TorchServe handler for archives of one OpenMMLab package."""

    package: ClassVar[str]

    def initialize(self, context: Any) -> None:
        """Load the unpacked archive.

        Raises:
            SetupError: the archive cannot be served.
        """
        install_log_filters()
        self.settings = Settings.from_environment()
        ops.install(self.settings.ops, cache_dir=self.settings.cache_dir)
        from serve.runtime import device_for
        from serve.runtime.malloc import disable_malloc_trim

        device = device_for(context.system_properties.get("gpu_id"))
        if device.type == "cpu" and self.settings.keep_heap:
            disable_malloc_trim()  # before a second thread starts, which would get its own malloc arena
        # Loads and computes in one thread: torch and its kernels keep state per thread (pools, current device).
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
                f"the archive has a {archive.metadata.modality} model of {archive.metadata.package}, but this handler "
                f"serves {self.package}"
            )
        self.detector = load_detector(archive, device, trust_code=self.settings.trust_archive_code)
        self.self_test_s = self_test(self.detector, archive)
        logger.info(
            "%s %s is ready on %s with %s kernels; its golden frame matched after %.2f s",
            archive.metadata.name, archive.metadata.version, device, ops.kernels_in_use(), self.self_test_s,
        )  # fmt: skip

    def handle(self, data: Sequence[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer every row of TorchServe's batch; an invalid row does not affect the others."""
        if context.get_request_header(0, "describe") == "True":
            return [encode_json(self.describe())]  # TorchServe sends this alone, never among predictions
        # 1. Read the rows and decode their frames.
        started = time.perf_counter()
        rows: list[tuple[Form, list[Any]]] = []
        for i, row in enumerate(data):
            try:
                request = read_row(row, context.get_all_request_header(i))
                rows.append((request.form, [self._decode(entry) for entry in request.entries]))
            except ServeError as error:
                rows.append(("frame", [error]))
        # 2. Run all decoded frames in one batch.
        found, seconds = self._run_frames([item for _, items in rows for item in items], started)
        outcomes = iter(found)
        # 3. Answer in order.
        answers = []
        for i, (form, items) in enumerate(rows):
            own = [next(outcomes) for _ in items]
            status, content_type, body = answer_row(form, own, context.get_request_id(i), seconds)
            # TorchServe counts characters but sends bytes, so phrases must be ASCII.
            context.set_response_status(status, HTTPStatus(status).phrase, i)
            context.set_response_header(i, "content-type", content_type)
            answers.append(body)
        return answers

    def answer_batch(self, body: memoryview, compute_s: int = 0) -> bytes:
        """Answer a framed batch with framed outcomes; may be called from any thread.

        Args:
            body: the framed batch.
            compute_s: seconds after which the watchdog ends the worker if it still computes; 0 for no limit.

        Raises:
            ServeError: the body is not a framed batch.
            Exception: the network failed.
        """
        started = time.perf_counter()
        outcomes_in_order, seconds = self._run_frames(
            [self._decode(entry) for entry in read_batch(body)], started, compute_s
        )
        return answer_row("outcomes", outcomes_in_order, None, seconds)[2]

    def _run_frames(
        self, items: Sequence[Any], started: float, compute_s: int = 0
    ) -> tuple[list[Any], dict[str, float]]:
        """Run the decoded frames; returns outcomes, errors passed through, and seconds by stage since `started`."""
        decoded = time.perf_counter()
        frames = [item for item in items if not isinstance(item, ServeError)]
        found, inference_s = self._engine.submit(self._infer, frames, compute_s).result()
        outcomes = iter(found)
        outcomes_in_order = [item if isinstance(item, ServeError) else next(outcomes) for item in items]
        return outcomes_in_order, {"decode": decoded - started, "inference": inference_s}

    def _infer(self, frames: Sequence[Any], compute_s: int) -> tuple[Sequence[Any], float]:
        """Run the network in the engine's thread; returns the outcomes and its duration, seconds."""
        began = time.perf_counter()
        with watchdog(compute_s):
            return self.detector.run(frames), time.perf_counter() - began

    def run_in_engine(self, call: Callable[[], Any]) -> Any:
        """Call in the thread that loads and computes; returns what the call returns."""
        return self._engine.submit(call).result()

    def describe(self) -> dict[str, Any]:
        """Describe archive and runtime, for ``?customized=true`` of TorchServe's management API."""
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
