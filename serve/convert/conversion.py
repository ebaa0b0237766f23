"""Convert a config and a checkpoint to a self-proving archive.

Steps: read the config (`serve.convert.config`), read the checkpoint as data, build the network, run the golden
frame, fold batch norms if the predictions stay the same, write the archive, then open it again and run the golden
frame on what was written. Nothing is printed: `Conversion.report` receives each step.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from serve import archive
from serve.archive import InferenceOptions, Metadata
from serve.archive.bounds import WEIGHTS
from serve.archive.format import Source
from serve.convert import golden
from serve.convert.blame import blaming
from serve.convert.classes import check_against_head, find_class_names
from serve.convert.config import resolve_config
from serve.convert.custom_code import collect_custom_code, names_unregistered
from serve.convert.proof import FrameCost, start_proof
from serve.errors import ArchiveError, CheckpointError, SelfTestError
from serve.protocol.batch import Body
from serve.protocol.frame_spec import FrameSpec
from serve.runtime.custom_code import names_foreign_modules
from serve.storage.hashes import sha256_of

__all__ = ["Conversion", "ConversionResult", "convert"]

RECORDED_PACKAGES = ("torch", "numpy", "mmengine", "mmcv-lite", "mmcv", "mmdet", "mmdet3d")


def _discard(step: str) -> None:
    del step


@dataclass(frozen=True)
class Conversion:
    """Inputs and options of a conversion.

    Attributes:
        config: path of the config.
        checkpoint: path of the ``.pth`` or ``.safetensors``.
        output_folder: folder of the archive; created if missing.
        model_name: name to serve under.
        model_version: digits and dots.
        device: device of the golden frame, ``cpu`` or ``cuda:N``.
        force: replace an existing archive.
        allow_partial: continue when keys are missing or unexpected.
        trust_checkpoint: unpickle any type in the checkpoint.
        extra_files: packed under ``extra/``.
        classes: class names by label, in place of those of checkpoint and config.
        golden_frame: the user's frame in place of the synthetic one; for a frame of several parts the folder of
            its files (``points.bin``, ``image.png``, ``calibration.json``, …).
        channels_last: see `serve.archive.metadata.InferenceOptions`.
        fold_batch_norm: fold batch norms if the predictions stay the same.
        autocast: see `serve.archive.metadata.InferenceOptions`.
        report: called with a line at the start of each step.
    """

    config: Path
    checkpoint: Path
    output_folder: Path
    model_name: str
    model_version: str = "1.0"
    device: str = "cpu"
    force: bool = False
    allow_partial: bool = False
    trust_checkpoint: bool = False
    extra_files: Sequence[Path] = ()
    classes: Sequence[str] = ()
    golden_frame: Path | None = None
    channels_last: bool = True
    fold_batch_norm: bool = True
    autocast: Literal["off", "fp16", "bf16"] = "off"
    report: Callable[[str], None] = _discard


@dataclass(frozen=True)
class ConversionResult:
    """A finished archive.

    Attributes:
        path: the archive.
        sha256: of the whole file, hex.
        metadata: as written.
        golden_detections: number of detections (segments, labelled points) in the golden frame; with 0, the proof
            compared nothing.
        cost: what the golden frame cost.
        parameters: number of parameters of the network.
        needs_trust: whether serving needs ``MMDET3D_SERVE_TRUST_ARCHIVE_CODE=1``.
        notes: remarks for the user (legacy weights adapted, batch norms not folded, …).
    """

    path: Path
    sha256: str
    metadata: Metadata
    golden_detections: int
    notes: tuple[str, ...]
    cost: FrameCost
    parameters: int
    needs_trust: bool


def convert(conversion: Conversion) -> ConversionResult:
    """Write and prove an archive; a failing step leaves no file behind.

    Raises:
        SetupError: a step failed; the message says what to change.
    """
    report = conversion.report
    report("loading torch")
    import torch
    from safetensors.torch import save_file

    from serve.convert.checkpoint import load_checkpoint
    from serve.convert.legacy_weights import adapt_and_load
    from serve.runtime.build_guard import BuildGuard
    from serve.runtime.model import build_network, import_package, is_segmentor, parse_device
    from serve.runtime.pipeline import box_type_of, frame_spec

    target = conversion.output_folder / f"{conversion.model_name}.mar"
    if target.exists() and not conversion.force:
        raise ArchiveError(f"{target} exists; choose another --model-name, or replace it with --force")
    device = parse_device(conversion.device)
    archive.check_identity(conversion.model_name, conversion.model_version)
    # 1. Config.
    report("reading the config")
    config, package, config_notes = resolve_config(conversion.config)
    with blaming(f"config {conversion.config}"):
        spec = frame_spec(config)
        code = collect_custom_code(config)
        needs_trust = bool(code.files) or names_foreign_modules(config) or names_unregistered(config)
    # 2. Checkpoint.
    report("reading the checkpoint")
    checkpoint = load_checkpoint(conversion.checkpoint, trust=conversion.trust_checkpoint)
    with blaming(f"config {conversion.config}"):
        named = find_class_names(config, checkpoint.classes or (), conversion.classes)
        check_against_head(named, config["model"])
    extra = _check_extra_files(conversion.extra_files)
    entries, frame = _load_golden_frame(conversion, spec)
    with start_proof(package) as proof:  # its imports go on meanwhile
        # 3. Network.
        report("building the network")
        import_package(package)
        guard = BuildGuard(None, config, refuse=False)
        with torch.random.fork_rng(), guard:
            torch.manual_seed(0)  # weights missing from the checkpoint are the same in every conversion
            network = build_network(config, named.names)
        with blaming(f"checkpoint {conversion.checkpoint}", CheckpointError):
            keys = adapt_and_load(network, checkpoint, allow_partial=conversion.allow_partial)
        notes = (*config_notes, *code.notes, *keys.notes)
        if not keys.ok:
            notes += (f"loaded in part (--allow-partial):\n{keys.summary()}",)
        state = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
        parameters = sum(weight.numel() for weight in network.parameters())
        network.to(device)
        # 4. Golden frame.
        flat = package == "mmdet" or spec.modality == "image" or is_segmentor(network)
        metadata = Metadata(
            name=conversion.model_name,
            version=conversion.model_version,
            modality=spec.modality,
            package=package,
            classes=named.names,
            box_type_3d=None if flat else box_type_of(config),
            load_dim=spec.load_dim if spec.has_points else None,
            color_type=None if spec.modality in ("lidar", "depth") else spec.color_type,
            golden_frame=entries,
            source=_record_source(conversion),
            inference=InferenceOptions((), conversion.channels_last, conversion.autocast),
            parts=spec.parts,
        )
        notes += golden.list_warnings(None if conversion.golden_frame is None else frame, spec)
        report("running the golden frame")
        with guard, blaming(f"config {conversion.config}"), _without_tracebacks():
            metadata, expected, remarks = _record_golden(
                network, config, metadata, frame, device, conversion.fold_batch_norm
            )
        notes += remarks
        if guard.refusal is not None and not needs_trust:
            notes += (f"the archive has to be trusted where it is served: {guard.refusal}",)
            needs_trust = True
        # 5. Archive.
        report("writing the archive")
        conversion.output_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-") as scratch:
            weights = Path(scratch) / WEIGHTS
            save_file({key: tensor.contiguous() for key, tensor in sorted(state.items())}, weights)
            # In the store, so that the final rename is atomic; TorchServe does not load files of this name.
            unproved = conversion.output_folder / f".{target.name}.{os.getpid()}.unproved"
            try:
                sha256 = archive.write(
                    unproved,
                    metadata,
                    config=config,
                    weights=weights,
                    golden_frame=frame,
                    golden_expected=expected,
                    code=code.files,
                    extra=extra,
                    force=True,
                )
                # 6. Proof, on the bytes that were written.
                report("proving the archive: a fresh process opens it and runs its golden frame")
                opened = archive.extract(unproved, Path(scratch) / "opened")
                cost = proof.prove(opened.root, device, trust_code=needs_trust)
                os.replace(unproved, target)
            finally:
                unproved.unlink(missing_ok=True)
    return ConversionResult(
        target,
        sha256,
        opened.metadata,
        _count(expected),
        notes,
        cost=cost,
        parameters=parameters,
        needs_trust=needs_trust,
    )


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep a worker's log of a failed frame from the terminal; the error that is raised says what failed."""
    log = logging.getLogger("serve.runtime.detector")
    former, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = former


def _count(answer: Mapping[str, Any]) -> int:
    """Count the detections, or the points or segments of predicted labels."""
    if "pts_semantic_mask" in answer:
        return int(answer["pts_semantic_mask"]["shape"][0])
    return len(answer["names"] if "names" in answer else answer["segments_info"])


def _record_golden(
    network: Any,
    config: Mapping[str, Any],
    metadata: Metadata,
    frame: Body,
    device: Any,
    fold: bool,
) -> tuple[Metadata, dict[str, Any], tuple[str, ...]]:
    """Choose channels_last and folding, and run the golden frame on the network as it will be served.

    Returns:
        The metadata with both choices, the predictions, and notes on what was switched off.
    """
    import torch

    from serve.compare.tolerances import tolerances_for
    from serve.runtime.detector import Detector, apply_options
    from serve.runtime.fusion import find_fusable
    from serve.runtime.selftest import compare_with_recorded, run_golden_frame

    plain = replace(metadata, inference=replace(metadata.inference, autocast="off"))
    detector = Detector(network, config, plain, device)
    apply_options(network, plain.inference)
    answers: list[dict[str, Any]] = []
    notes: tuple[str, ...] = ()
    try:
        pairs = find_fusable(network, lambda: answers.append(run_golden_frame(detector, frame)))
    except SelfTestError:
        if not plain.inference.channels_last:
            raise
        # Point cloud networks feed convolution outputs to kernels that require NCHW order.
        network.to(memory_format=torch.contiguous_format)
        plain, metadata = (
            replace(each, inference=replace(each.inference, channels_last=False))
            for each in (plain, metadata)
        )
        pairs = find_fusable(network, lambda: answers.append(run_golden_frame(detector, frame)))
        notes = ("channels_last is off: the model cannot run with it",)
    unfolded = answers[0]
    if not fold or not pairs:
        return metadata, unfolded, notes
    folding = replace(plain.inference, fold_batch_norm=pairs)
    apply_options(network, folding)
    try:
        folded = run_golden_frame(detector, frame)
    except SelfTestError as error:
        notes = (*notes, f"batch norms are not folded: the folded model cannot run ({error})")
        return metadata, unfolded, notes
    found = compare_with_recorded(detector, unfolded, folded, frame, tolerances_for(device))
    if not found.ok:
        notes = (
            *notes,
            f"batch norms are not folded: folding changes the predictions ({found.verdict()})",
        )
        return metadata, unfolded, notes
    return replace(metadata, inference=replace(folding, autocast=metadata.inference.autocast)), folded, notes


def _load_golden_frame(conversion: Conversion, spec: FrameSpec) -> tuple[str | dict[str, str], Any]:
    """Entry names and bytes of the golden frame; by part if the frame has several."""
    if conversion.golden_frame is None:
        parts = golden.golden_frame(spec)
    else:
        try:
            parts = golden.read_frame(conversion.golden_frame, spec)
        except OSError as error:
            raise ArchiveError(f"golden frame {conversion.golden_frame} cannot be read: {error}") from None
    if len(parts) == 1:
        (((file, body)),) = parts.values()
        return f"golden/{file}", body
    return (
        {part: f"golden/{file}" for part, (file, _) in parts.items()},
        {part: body for part, (_, body) in parts.items()},
    )


def _record_source(conversion: Conversion) -> dict[str, str]:
    """File names and hashes of config and checkpoint, and versions of the packages involved."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "config": conversion.config.name,
        "config_sha256": sha256_of(conversion.config),
        "checkpoint": conversion.checkpoint.name,
        "checkpoint_sha256": sha256_of(conversion.checkpoint),
        **versions,
    }


def _check_extra_files(files: Sequence[Path]) -> dict[str, Source]:
    names = [file.name for file in files]
    if len(set(names)) != len(names):
        raise ArchiveError(f"extra files must have different names, not {', '.join(names)}; rename one")
    for file in files:
        if not file.is_file():
            raise ArchiveError(f"extra file {file} does not exist")
    return {file.name: file for file in files}
