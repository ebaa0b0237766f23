"""Loaded model that runs lists of frames.

Each frame has one outcome, in order: an answer, or its own error. Point clouds form one batch; images are batched if
their prepared shapes are equal, because padding one to another's size would change its answer. Models that draw random
numbers run frame by frame, with the same seed for each.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from serve.archive import Archive, InferenceOptions, Metadata
from serve.archive.bounds import failures_as_archive_errors
from serve.errors import (
    ArchiveError,
    CheckpointError,
    InferenceFailed,
    OutOfMemory,
    ServeError,
    error_of_frame,
)
from serve.ops.device_kernels import device_kernels
from serve.protocol.batch import Body
from serve.protocol.calibration import MATRICES
from serve.protocol.frame_warnings import share_in_range
from serve.protocol.frames import Frame, decode_frame
from serve.protocol.options import FrameOptions
from serve.protocol.selection import check_selection, select
from serve.protocol.worker import ObservedAnswer, Outcome
from serve.runtime import fusion
from serve.runtime.accelerator.graphs import release_graphs
from serve.runtime.accelerator.install import install as install_for_accelerator
from serve.runtime.accelerator.transfer import pin
from serve.runtime.background import background_skipped, set_skipping
from serve.runtime.build_guard import BuildGuard
from serve.runtime.custom_code import import_archived_code
from serve.runtime.model import (
    build_network,
    import_package,
    is_segmentor,
    load_state_dict_strict,
    suppress_warnings,
)
from serve.runtime.pipeline import InputPipeline
from serve.runtime.predictions import empty_detections, empty_labels, postprocess
from serve.runtime.random_state import fixed_seed
from serve.settings import Limits
from serve.watch.observation import ObservedFrame
from serve.watch.statistics import Layout

__all__ = ["Detector", "Outcome", "load_detector"]

logger = logging.getLogger(__name__)


class Detector:
    """Network with its test pipeline and metadata. Not thread-safe: one worker, one detector.

    Attributes:
        network: in evaluation mode.
        metadata: of its archive.
        device: that it runs on.
        is_observed: whether `run` returns answers as `ObservedAnswer`, with an `ObservedFrame` each.
    """

    def __init__(
        self, network: nn.Module, config: Mapping[str, Any], metadata: Metadata, device: torch.device
    ) -> None:
        """Wrap a network in evaluation mode on `device`; `load_detector` applies inference options."""
        self.network = network
        self.metadata = metadata
        self.device = device
        self._samples = InputPipeline(config)
        self._model = {"name": metadata.name, "version": metadata.version}
        self._segments = is_segmentor(network)
        # A segmentor labels every point, even outside of its range.
        self._range = None if self._segments else _voxel_range(network)
        self._device_kernels = (
            device_kernels(device.index or 0).description if device.type == "cuda" else None
        )
        self.is_observed = False
        self._draws = False
        self._guard: AbstractContextManager[Any] = nullcontext()

    def guarded(self) -> AbstractContextManager[Any]:
        """Context in which the detector of an archive that is not trusted can only compute."""
        return self._guard

    def describe(self) -> dict[str, Any]:
        """Describe model, input and device for the gateway."""
        metadata, spec = self.metadata, self._samples.spec
        return {
            **self._model,
            "modality": spec.modality,
            "parts": list(spec.parts),
            "columns": list(spec.layout.columns) if spec.has_points else None,
            "sweeps": None if spec.sweeps is None else asdict(spec.sweeps),
            "warnings": [warning.document() for warning in spec.warnings],
            "package": metadata.package,
            "classes": list(metadata.classes),
            "box_type_3d": metadata.box_type_3d,
            "load_dim": metadata.load_dim,
            "device": str(self.device),
            "skips_background": background_skipped(self.network),
            "device_kernels": self._device_kernels,
            "serve_version": metadata.serve_version,
        }

    def decode(self, body: Body, options: FrameOptions, limits: Limits) -> Frame:
        """Decode one frame for this model; raises like `decode_frame` and `check_selection`."""
        check_selection(options, self.metadata.classes)
        return decode_frame(body, self._samples.spec, options, limits)

    @property
    def layout(self) -> Layout:
        """Bins in which frames and detections are counted if no reference has others."""
        return Layout.of_classes(self.metadata.classes)

    def expect_intensities_of(self, frame: Frame) -> None:
        """Expect intensities like those of an archive's golden frame, for warnings about other frames."""
        self._samples.expect_intensities_of(frame)

    def run(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Run all frames in as few batches as their shapes allow; errors of frames are returned as outcomes."""
        outcomes: dict[int, Outcome] = {}
        groups: dict[Any, dict[int, dict[str, Any]]] = {}
        for i, frame in enumerate(frames):
            try:
                with self._guard:
                    sample = None if frame.has_no_points else self.prepare(frame)
                if sample is None or self._is_empty(sample):
                    outcomes[i] = self._empty()
                else:
                    groups.setdefault(_batch_key(sample), {})[i] = sample
            except Exception as error:
                outcomes[i] = self._to_error(error)
        for members in groups.values():
            outcomes.update(zip(members, self._run_group(list(members.values())), strict=True))
        return [self._finish(outcomes[i], frame) for i, frame in enumerate(frames)]

    def forward(self, samples: Sequence[dict[str, Any]]) -> list[Any]:
        """Run prepared inputs as one batch; return the network's own data samples."""
        from mmengine.dataset import pseudo_collate

        with torch.no_grad(), self._on_device(), self._precision(), suppress_warnings():
            batch: Any = pseudo_collate(list(samples))
            if self.device.type == "cuda":
                batch["inputs"] = pin(batch["inputs"])
            step: Any = self.network.test_step
            results: list[Any] = step(batch)
        return results

    def prepare(self, frame: Frame) -> dict[str, Any]:
        """Run the test pipeline on one frame."""
        with suppress_warnings(), fixed_seed(self.device):
            return self._samples.build(frame)

    def _run_group(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        """Run one batch, or frame by frame if the network draws random numbers, which other frames would change."""
        if not self._draws:
            with fixed_seed(self.device) as random_state:
                outcomes = self._run_batch(samples)
            self._draws = random_state.used
            if not self._draws or len(samples) == 1:
                return outcomes
        alone: list[Outcome] = []
        for sample in samples:
            with fixed_seed(self.device):
                alone += self._run_batch([sample])
        return alone

    def _run_batch(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        try:
            with self._guard:
                results = self.forward(samples)
                if len(results) != len(samples):
                    raise InferenceFailed(
                        f"the network returned {len(results)} results for {len(samples)} frames"
                    )
                return [
                    postprocess(result, self.metadata.classes, self.metadata.box_type_3d, self._model)
                    for result in results
                ]
        except Exception as error:
            if len(samples) == 1:
                return [self._to_error(error)]
            # Half of the batch may fit the device, and one bad frame must not fail the others.
            logger.warning("batch of %d frames failed (%s); retrying in halves", len(samples), error)
            if _is_out_of_memory(error) and self.device.type == "cuda":
                release_graphs(self.network)
                torch.cuda.empty_cache()
        half = len(samples) // 2
        return [*self._run_batch(samples[:half]), *self._run_batch(samples[half:])]

    def _finish(self, outcome: Outcome, frame: Frame) -> Outcome:
        """Add the warnings about a frame to its answer, and select what its options ask for."""
        if isinstance(outcome, ServeError):
            return outcome
        try:
            warnings = [warning.document() for warning in frame.warnings]
            answer = select({**outcome, "warnings": warnings} if warnings else outcome, frame.options)
            return ObservedAnswer(answer, self._observe(outcome, frame)) if self.is_observed else answer
        except Exception as error:
            return self._to_error(error)

    def _observe(self, answer: dict[str, Any], frame: Frame) -> ObservedFrame:
        points, bounds = frame.points, self._samples.spec.expected.point_cloud_range
        return ObservedFrame(
            answer,
            None if points is None else len(points),
            None if points is None or bounds is None else share_in_range(points, bounds),
            tuple(warning.code for warning in frame.warnings),
        )

    def _to_error(self, error: Exception) -> ServeError:
        if _is_out_of_memory(error):
            return OutOfMemory("a single frame exceeds the device's memory; send a smaller frame")
        if isinstance(error, ArchiveError):  # the guard's, for who serves the archive and not for the client
            logger.error("the archive of %s failed on one frame: %s", self.metadata.name, error)
            return InferenceFailed("the model did what only a trusted archive may do; see the worker's log")
        if not isinstance(error, ServeError):
            logger.error("inference failed on one frame", exc_info=error)
        return error_of_frame(error, InferenceFailed, "the model failed on this frame")

    def _is_empty(self, sample: dict[str, Any]) -> bool:
        """Return whether no point is in the model's range; voxel networks fail without voxels."""
        inputs = sample["inputs"]
        if not isinstance(inputs, Mapping) or "points" not in inputs:
            return False
        points = inputs["points"]
        if self._range is not None:
            low, high = self._range
            points = points[((points[:, :3] >= low) & (points[:, :3] < high)).all(dim=1)]
        return len(points) == 0

    def _empty(self) -> dict[str, Any]:
        if self._segments:
            return empty_labels(self.metadata.classes, self._model)
        width = 4 if self.metadata.box_type_3d is None else _box_width(self.network)
        return empty_detections(self.metadata.classes, self.metadata.box_type_3d, self._model, width)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make the device the current one: streams, and kernels that Triton launches, belong to that."""
        there = self.device.type == "cuda" and torch.cuda.is_available()
        return torch.cuda.device(self.device) if there else nullcontext()

    def _precision(self) -> AbstractContextManager[Any]:
        autocast = self.metadata.inference.autocast
        if self.device.type != "cuda" or autocast == "off":
            return nullcontext()
        return torch.autocast("cuda", dtype=torch.float16 if autocast == "fp16" else torch.bfloat16)


def load_detector(
    archive: Archive,
    device: torch.device,
    *,
    trust_code: bool = False,
    skip_background: bool = True,
    cuda_graphs: bool = False,
) -> Detector:
    """Build the model of a verified archive on `device`.

    Args:
        archive: archive from `serve.archive.format.open_directory`.
        device: device to run on.
        trust_code: allow imports of modules packed in the archive, and anything else that its model does. Without it,
            the model is built, and computes, under a `BuildGuard`.
        skip_background: compute only what differs from the answer to an empty cloud (`serve.runtime.background`).
        cuda_graphs: on a CUDA device, replay recorded launches (`serve.runtime.accelerator.graphs`).

    Raises:
        ArchiveError: the archive would run code that is not allowed, or its parts do not fit.
        CheckpointError: the weights do not fit the config.
    """
    config = archive.config()
    guard = nullcontext() if trust_code else BuildGuard(archive.root, config)
    weights = _read_weights(archive)
    if device.type == "cuda":
        device_kernels(device.index or 0)  # now, because its trial does what a guard refuses
    import_package(archive.metadata.package)  # now, because its modules do what a guard refuses
    with failures_as_archive_errors("the model"), guard:
        import_archived_code(archive, config, trust_code=trust_code)
        network = build_network(config, archive.metadata.classes)
        load_state_dict_strict(network, weights)
        network.to(device)
        apply_options(network, archive.metadata.inference)
        if device.type != "cpu":
            install_for_accelerator(network, cuda_graphs=cuda_graphs)
        set_skipping(network, enabled=skip_background)
        detector = Detector(network, config, archive.metadata, device)
        detector._guard = guard
        return detector


def _read_weights(archive: Archive) -> dict[str, torch.Tensor]:
    """Read the safetensors file of an archive, which is not executed in any way."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(archive.weights)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the weights of the archive cannot be read ({error}); convert it again"
        ) from error


def apply_options(network: nn.Module, options: InferenceOptions) -> None:
    """Apply an archive's fusion and memory layout to a network.

    Raises:
        ArchiveError: a module to fuse is not in the network.
    """
    try:
        fusion.fuse(network, options.fold_batch_norm)
    except KeyError as error:
        raise ArchiveError(
            f"the archive fuses module {error}, which its model lacks; convert the model again"
        ) from None
    if options.channels_last:
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _batch_key(sample: dict[str, Any]) -> Any:
    """Return the key of samples that form one batch; mmdet packs a bare image, mmdet3d a dictionary.

    Point clouds may differ in length. Shapes of images and of camera matrices must be equal: networks stack both.
    """
    inputs = sample["inputs"]
    image = inputs.get("img") if isinstance(inputs, Mapping) else inputs
    if image is None:
        return None
    meta = sample["data_samples"].metainfo
    cameras = tuple(np.shape(meta[name]) for name in MATRICES if name in meta)
    return tuple(image.shape), cameras


def _voxel_range(network: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    layer = getattr(getattr(network, "data_preprocessor", None), "voxel_layer", None)
    bounds = getattr(layer, "point_cloud_range", None)
    if bounds is None or len(bounds) != 6:
        return None
    low, high = np.asarray(bounds, dtype=np.float32).reshape(2, 3)
    return torch.from_numpy(low), torch.from_numpy(high)


def _box_width(network: nn.Module) -> int:
    coder = getattr(getattr(network, "bbox_head", None), "bbox_coder", None)
    return int(getattr(coder, "code_size", 7))


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(
        error
    )
