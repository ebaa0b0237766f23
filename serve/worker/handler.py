"""Handlers: what TorchServe and the worker's socket call with frames, and what they answer.

A handler has the hooks `describe` and `infer`, and `count` for what is watched. `Handler.answer` is behind both ways
in, TorchServe's `handle` and the socket (`serve.worker.server`): it decodes the frames of a batch in the thread that
received it, infers in a single thread, so that the next batch is read and decoded meanwhile, and gives each frame its
own outcome. Whatever fails with one frame is the outcome of that frame.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from serve import ops
from serve.errors import (
    ArchiveError,
    BadRequest,
    InferenceFailed,
    NotReady,
    ServeError,
    SetupError,
    UndecodableFrame,
    error_of_frame,
)
from serve.protocol.json_bodies import encode_json
from serve.protocol.start_record import record_start
from serve.protocol.worker import (
    Batch,
    EncodedFrame,
    ObservedAnswer,
    Outcome,
    read_batch,
    write_outcomes,
)
from serve.settings import Settings
from serve.watch.observation import count_frames
from serve.watch.reference import Reference
from serve.watch.statistics import SCORE_THR
from serve.worker.confinement import confine_writes
from serve.worker.cpu_quota import available_cores
from serve.worker.log_filters import install_log_filters
from serve.worker.rows import Row, answer_row, read_row
from serve.worker.server import Cancelled, listen
from serve.worker.watchdog import watchdog

if TYPE_CHECKING:
    from serve.protocol.frames import Frame

__all__ = ["DetectionHandler", "Handler"]

logger = logging.getLogger(__name__)


class Handler:
    """Base of the handlers that TorchServe imports."""

    # Hooks

    def load(self, context: Any) -> None:
        """Load the model, in the thread that infers; by default there is nothing to load."""

    def describe(self) -> dict[str, Any]:
        """Describe the model for the gateway, also ``?customized=true`` of TorchServe's management API."""
        raise NotImplementedError

    def decode(self, frame: EncodedFrame) -> Any:
        """Decode one frame for `infer`; called by several threads. By default `infer` takes encoded frames."""
        return frame

    def infer(self, frames: Sequence[Any]) -> Sequence[Outcome]:
        """Return one outcome per frame, in order; always called in the same thread.

        If it raises, each frame is tried alone.
        """
        raise NotImplementedError

    def count(self, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
        """Count what is watched of some frames, beside the thread that infers; None if nothing is."""
        return None

    # What TorchServe and the socket call

    def initialize(self, context: Any) -> None:
        """Load the model and listen for batches.

        Raises:
            SetupError: the archive cannot be served, or a module cannot be imported.
        """
        install_log_filters()
        self.settings = Settings.from_environment()
        # Loads and computes in one thread: torch and its kernels keep state per thread (pools, current device).
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")  # starts it with the first call
        with record_start(self.settings.worker_sockets, str(getattr(context, "model_name", ""))):
            try:
                self.prepare_process(context)
                self._engine.submit(self.load, context).result()
            except ImportError as error:
                raise SetupError(
                    f"the worker cannot import {error.name}: {error}; install it where the model is served"
                ) from error
        if self.settings.worker_sockets is not None:
            listen(self.settings.worker_sockets, self.respond)

    def prepare_process(self, context: Any) -> None:
        """Set up the process before a second thread starts."""

    def prepare_thread(self) -> None:
        """Set up a thread before it computes; called again for every batch."""

    def handle(self, data: Sequence[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer every row of TorchServe's batch; an invalid row does not affect the others."""
        if context.get_request_header(0, "describe") == "True":
            return [encode_json(self.describe())]  # TorchServe sends this alone, never among predictions
        rows = [_read_row(row, context, i) for i, row in enumerate(data)]
        found, seconds = self.answer(Batch([frame for row in rows for frame in row.frames]))
        outcomes = iter(found)
        answers = []
        for i, row in enumerate(rows):
            own = [next(outcomes) for _ in row.frames]
            observed = self._count(own) if row.form == "outcomes" else None
            status, content_type, body = answer_row(
                row.form, own, context.get_request_id(i), seconds, observed
            )
            # TorchServe counts characters but sends bytes, so phrases must be ASCII.
            context.set_response_status(status, HTTPStatus(status).phrase, i)
            context.set_response_header(i, "content-type", content_type)
            answers.append(body)
        return answers

    def respond(self, body: memoryview, compute_s: int, cancelled: Cancelled) -> bytes:
        """Answer a framed batch that came through the worker's socket with framed outcomes."""
        outcomes, seconds = self.answer(Batch(read_batch(body), compute_s, cancelled))
        return write_outcomes(outcomes, seconds, self._count(outcomes))

    # Batches

    def answer(self, batch: Batch) -> tuple[list[Outcome], dict[str, float]]:
        """Answer a batch; may be called from any thread. Frames that were cancelled are neither decoded nor inferred.

        Returns:
            One outcome per frame, in order, and the seconds of each stage.
        """
        started = time.perf_counter()
        self.prepare_thread()
        outcomes: dict[int, Outcome] = {}
        frames: dict[int, Any] = {}
        with watchdog(batch.compute_s):
            for i, frame in enumerate(batch.frames):
                if isinstance(frame, ServeError):
                    outcomes[i] = frame
                elif i not in batch.cancelled():
                    try:
                        frames[i] = self.decode(frame)
                    except BaseException as error:
                        outcomes[i] = _outcome_of(error, UndecodableFrame, "the frame cannot be decoded")
        decoded = time.perf_counter()
        found, inference_s = self._engine.submit(self._infer, batch, frames).result()
        outcomes.update(found)
        cancelled = NotReady("the frame was cancelled")
        return (
            [outcomes.get(i, cancelled) for i in range(len(batch.frames))],
            {"decode": decoded - started, "inference": inference_s},
        )

    def _count(self, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
        try:
            return self.count(outcomes)
        except Exception:
            logger.exception("the frames of a batch cannot be counted; their answers are as ever")
            return None

    def run_in_engine(self, call: Callable[[], Any]) -> Any:
        """Call in the thread that loads and computes; returns what the call returns."""
        return self._engine.submit(call).result()

    def _infer(self, batch: Batch, frames: dict[int, Any]) -> tuple[dict[int, Outcome], float]:
        """Infer, in the engine's thread; returns outcomes by position and the duration, seconds."""
        began = time.perf_counter()
        wanted = {i: frame for i, frame in frames.items() if i not in batch.cancelled()}
        outcomes: dict[int, Outcome] = {}
        with watchdog(batch.compute_s):
            if len(wanted) > 1:
                try:
                    outcomes = self._infer_once(wanted)
                except BaseException as error:
                    _outcome_of(
                        error, InferenceFailed, f"a batch of {len(wanted)} frames failed; trying each alone"
                    )
            for i in wanted.keys() - outcomes.keys():
                try:
                    outcomes |= self._infer_once({i: wanted[i]})
                except BaseException as error:
                    outcomes[i] = _outcome_of(error, InferenceFailed, "the model failed on this frame")
        return outcomes, time.perf_counter() - began

    def _infer_once(self, frames: dict[int, Any]) -> dict[int, Outcome]:
        found = list(self.infer(list(frames.values())))
        if len(found) != len(frames):
            raise InferenceFailed(f"the model returned {len(found)} outcomes for {len(frames)} frames")
        return dict(zip(frames, found, strict=True))


# Whether a thread has been confined: TorchServe loads a model in one and calls its handler in another.
_confined = threading.local()


class DetectionHandler(Handler):
    """Handler for archives of one OpenMMLab package: opens, checks and self-tests the archive, runs its detector."""

    package: ClassVar[str]

    def prepare_process(self, context: Any) -> None:
        """Install the kernels and set up memory."""
        ops.install(self.settings.ops, cache_dir=self.settings.cache_dir)
        from serve.runtime import device_for
        from serve.runtime.malloc import disable_malloc_trim

        self._device = device_for(context.system_properties.get("gpu_id"))
        if self._device.type == "cuda":
            from serve.ops.device_kernels import device_kernels, keep_code_in

            keep_code_in(self.settings.cache_dir, confined=self.settings.confine)
            device_kernels(
                self._device.index or 0
            )  # before a thread is confined: the trial needs a C compiler
        if self._device.type == "cpu" and self.settings.keep_heap:
            disable_malloc_trim()  # before a second thread starts, which would get its own malloc arena

    def load(self, context: Any) -> None:
        """Load the unpacked archive and run its golden frame.

        Raises:
            SetupError: the archive cannot be served.
        """
        import torch

        from serve.archive import open_directory
        from serve.runtime import load_detector
        from serve.runtime.model import import_package
        from serve.runtime.selftest import self_test

        torch.set_num_threads(self.settings.threads or min(torch.get_num_threads(), available_cores()))
        archive = open_directory(Path(context.system_properties["model_dir"]))
        if archive.metadata.package != self.package:
            raise ArchiveError(
                f"the archive has a {archive.metadata.modality} model of {archive.metadata.package}, but this handler "
                f"serves {self.package}"
            )
        import_package(
            self.package
        )  # before it is confined: matplotlib, for one, makes a folder when it is imported
        self.prepare_thread()
        self.detector = load_detector(
            archive,
            self._device,
            trust_code=self.settings.trust_archive_code,
            skip_background=self.settings.skip_background,
            cuda_graphs=self.settings.cuda_graphs == "auto",
        )
        self.self_test_s = self_test(self.detector, archive)
        self.reference = archive.reference()
        self.layout = self.detector.layout if self.reference is None else self.reference.counts.layout
        self.detector.is_observed = self.settings.watch
        logger.info(
            "%s %s is ready on %s with %s kernels; its golden frame matched after %.2f s",
            archive.metadata.name, archive.metadata.version, self._device, ops.kernels_in_use(), self.self_test_s,
        )  # fmt: skip

    def prepare_thread(self) -> None:
        """Let the thread write only its machine code, the record of the start, and devices, if settings say so."""
        if not self.settings.confine or getattr(_confined, "tried", False):
            return
        _confined.tried = True
        from serve.ops.cpu import jit_cache

        folders = [*jit_cache.possible_folders(), Path("/dev")]
        folders += [self.settings.worker_sockets] if self.settings.worker_sockets is not None else []
        if not confine_writes(folders):
            logger.info("the kernel has no Landlock: writing by libraries in C is not refused")

    def describe(self) -> dict[str, Any]:
        """Describe archive and runtime."""
        return {
            **self.detector.describe(),
            "self_test": {"passed": True, "seconds": self.self_test_s},
            "kernels": ops.kernels_in_use(),
            **({} if self.reference is None else {Reference.KEY: self.reference.document()}),
        }

    def count(self, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
        """Count frames and detections by `serve.watch`."""
        found = [each.observed for each in outcomes if isinstance(each, ObservedAnswer)]
        if not found:
            return None
        score_thr = SCORE_THR if self.reference is None else self.reference.score_thr
        return count_frames(found, self.layout, score_thr).document()

    def decode(self, frame: EncodedFrame) -> Frame:
        """Decode one frame; raises like `serve.protocol.frames.decode_frame`."""
        return self.detector.decode(frame.body, frame.options, self.settings.limits)

    def infer(self, frames: Sequence[Frame]) -> Sequence[Outcome]:
        """Run the detector."""
        return self.detector.run(frames)


def _read_row(row: dict[str, Any], context: Any, i: int) -> Row:
    try:
        return read_row(row, context.get_all_request_header(i))
    except BaseException as error:
        return Row((_outcome_of(error, BadRequest, "the request cannot be read"),))


def _outcome_of(error: BaseException, kind: type[ServeError], what: str) -> ServeError:
    """Return the outcome of a frame with which something failed: a `ServeError` itself, for all else one of `kind`.

    To be called for every `BaseException`: libraries in Rust panic with one, and ``exit()`` in a pipeline must not end
    the worker.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    if not isinstance(error, ServeError):
        logger.warning("%s", what, exc_info=error)
    return error_of_frame(error, kind, what)
