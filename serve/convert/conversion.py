"""Config and checkpoint to a self-proving archive.

The steps: read the config (this runs the config's Python, as OpenMMLab does), read the checkpoint as data,
build the network, run the golden frame, fold what can be folded without changing the answer, write the
archive, then open it afresh and prove it. Knows nothing about command lines and prints nothing:
`Conversion.report` is told of each step.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from serve import archive
from serve.archive import InferenceOptions, Metadata
from serve.archive.format import WEIGHTS, Source
from serve.convert import golden
from serve.errors import ArchiveError, CheckpointError, SelfTestError
from serve.protocol.batch import Body
from serve.protocol.frames import FrameSpec
from serve.storage.download import sha256_of

__all__ = ["Conversion", "ConversionResult", "configured_classes", "convert", "resolve_config"]

# What a config says about training, evaluation and logging stays outside the archive.
KEPT_KEYS = (
    "default_scope",
    "custom_imports",
    "model",
    "test_dataloader",
    "test_pipeline",
    "class_names",
    "metainfo",
    "point_cloud_range",
    "input_modality",
)
RECORDED_PACKAGES = ("torch", "numpy", "mmengine", "mmcv-lite", "mmcv", "mmdet", "mmdet3d")
# Folding reorders float32 arithmetic; more than this means it changed the function.
FOLDING_BOX_M, FOLDING_BOX_PX, FOLDING_SCORE = 1e-3, 0.1, 1e-4


def _silent(step: str) -> None:
    del step


@dataclass(frozen=True)
class Conversion:
    """What to convert and how.

    Attributes:
        config: path of the config.
        checkpoint: path of the ``.pth`` or ``.safetensors``.
        output_folder: where the archive goes; made if missing.
        model_name: name to serve under.
        model_version: digits and dots.
        device: where the golden frame is run, ``cpu`` or ``cuda:N``.
        force: replace an existing archive.
        allow_partial: go on when keys are missing or unexpected.
        trust_checkpoint: unpickle anything the checkpoint holds.
        extra_files: packed under ``extra/``.
        golden_frame: a frame of the user's own instead of a made one; a folder of its parts
            (``points.bin``, ``image.png``, ``calibration.json``, …) where there are several.
        channels_last: see `serve.archive.format.InferenceOptions`.
        fold_batch_norm: fold where the answer stays the same.
        autocast: see `serve.archive.format.InferenceOptions`.
        report: told of each step.
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
    golden_frame: Path | None = None
    channels_last: bool = True
    fold_batch_norm: bool = True
    autocast: Literal["off", "fp16", "bf16"] = "off"
    report: Callable[[str], None] = _silent


@dataclass(frozen=True)
class ConversionResult:
    """What came out.

    Attributes:
        path: the archive.
        sha256: of the whole file, hex.
        metadata: as written.
        golden_detections: how many detections (segments, labelled points) the golden frame has.
        notes: what the user should know (legacy weights adapted, folding refused, …).
    """

    path: Path
    sha256: str
    metadata: Metadata
    golden_detections: int
    notes: tuple[str, ...]


def convert(conversion: Conversion) -> ConversionResult:
    """Do it all; nothing is left behind when a step fails.

    Raises:
        SetupError: with a sentence that says what to change.
    """
    import torch
    from safetensors.torch import save_file

    from serve.convert.checkpoint import load_checkpoint
    from serve.convert.legacy_weights import adapt_and_load
    from serve.runtime import load_detector
    from serve.runtime.model import build_network, is_segmentor
    from serve.runtime.pipeline import box_type_of, frame_spec
    from serve.runtime.selftest import self_test

    say = conversion.report
    target = conversion.output_folder / f"{conversion.model_name}.mar"
    if target.exists() and not conversion.force:
        raise ArchiveError(f"{target} exists; choose another --model-name, or replace it with --force")
    device = torch.device(conversion.device)
    # 1. Config.
    say("reading the config")
    config, package = resolve_config(conversion.config)
    spec = frame_spec(config)
    code = _custom_code(config)
    # 2. Checkpoint and network.
    say("reading the checkpoint")
    checkpoint = load_checkpoint(conversion.checkpoint, trust=conversion.trust_checkpoint)
    classes = tuple(checkpoint.classes or configured_classes(config))
    if not classes:
        raise CheckpointError(
            f"neither {conversion.checkpoint.name} nor the config names the classes; add metainfo=dict(classes=[…])"
        )
    say("building the network")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what the checkpoint lacks is the same every time
        network = build_network(config, classes)
    report = adapt_and_load(network, checkpoint, allow_partial=conversion.allow_partial)
    notes = report.notes if report.ok else (*report.notes, f"converted in part:\n{report.summary()}")
    state = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    network.to(device)
    # 3. Golden frame.
    entries, frame = _golden(conversion, spec)
    flat = package == "mmdet" or spec.modality == "image" or is_segmentor(network)
    metadata = Metadata(
        name=conversion.model_name,
        version=conversion.model_version,
        modality=spec.modality,
        package=package,
        classes=classes,
        box_type_3d=None if flat else box_type_of(config),
        load_dim=spec.load_dim if spec.has_points else None,
        color_type=None if spec.modality in ("lidar", "depth") else spec.color_type,
        golden_frame=entries,
        source=_source(conversion),
        inference=InferenceOptions((), conversion.channels_last, conversion.autocast),
        parts=spec.parts,
    )
    say("running the golden frame")
    metadata, expected, remark = _record(network, config, metadata, frame, device, conversion.fold_batch_norm)
    notes += remark
    # 4. Archive.
    say("writing the archive")
    conversion.output_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-") as scratch:
        weights = Path(scratch) / WEIGHTS
        save_file({key: tensor.contiguous() for key, tensor in sorted(state.items())}, weights)
        # In the store, so that taking its place is one step; not a name TorchServe would load.
        unproved = conversion.output_folder / f".{target.name}.{os.getpid()}.unproved"
        sha256 = archive.write(
            unproved,
            metadata,
            config=config,
            weights=weights,
            golden_frame=frame,
            golden_expected=expected,
            code=code,
            extra=_extra(conversion.extra_files),
            force=True,
        )
        # 5. Proof: what was written, not what was meant.
        say("opening the archive afresh and proving it")
        try:
            opened = archive.extract(unproved, Path(scratch) / "opened")
            detector = load_detector(opened, device, trust_code=True)
            self_test(detector, opened)
            os.replace(unproved, target)
        finally:
            unproved.unlink(missing_ok=True)
    return ConversionResult(target, sha256, opened.metadata, _count(expected), notes)


def _count(answer: Mapping[str, Any]) -> int:
    """Detections of an answer; points or segments where it is of labels."""
    if "pts_semantic_mask" in answer:
        return int(answer["pts_semantic_mask"]["shape"][0])
    return len(answer["names"] if "names" in answer else answer["segments_info"])


def resolve_config(path: Path) -> tuple[dict[str, Any], Literal["mmdet", "mmdet3d"]]:
    """Read a config and keep what serving needs, as plain data, with the package it is for.

    Runs the config's Python and imports its custom modules.

    Raises:
        ArchiveError: missing, unreadable, or not for mmdet or mmdet3d.
    """
    from serve import ops
    from serve.runtime.model import scope_of, strip_pretrained, suppress_warnings

    ops.install()
    if not path.is_file():
        raise ArchiveError(f"config {path} does not exist")
    with suppress_warnings():
        from mmengine.config import Config

        from serve.storage import backends  # noqa: F401  (registers s3:// and packed files with mmengine)

        try:
            full = Config.fromfile(str(path), import_custom_modules=False).to_dict()
        except Exception as error:
            raise ArchiveError(f"config {path} cannot be read: {error}") from error
    if "model" not in full:
        raise ArchiveError(f"config {path} describes no model")
    scope = scope_of(full)
    if scope not in ("mmdet", "mmdet3d"):
        raise ArchiveError(f"config {path} is for {scope}; served are mmdet and mmdet3d")
    _inline_teacher(full["model"], path)
    kept = {key: full[key] for key in KEPT_KEYS if full.get(key) is not None}
    kept["default_scope"] = scope
    config: dict[str, Any] = strip_pretrained(kept)
    if config.get("custom_imports"):
        with suppress_warnings():
            from mmengine.utils import import_modules_from_strings

            import_modules_from_strings(**dict(config["custom_imports"]))
    return config, "mmdet3d" if scope == "mmdet3d" else "mmdet"


def _inline_teacher(model: dict[str, Any], path: Path) -> None:
    """Distilled students build their teacher from a config named by a path from upstream's root; put it inside."""
    from mmengine.config import Config

    named = model.get("teacher_config")
    if not isinstance(named, str):
        return
    for root in (Path(), *path.resolve().parents):
        if (root / named).is_file():
            model["teacher_config"] = {"model": Config.fromfile(str(root / named)).to_dict()["model"]}
            return
    raise ArchiveError(f"config {path} names a teacher's config {named}, which is not there")


def _record(
    network: Any,
    config: Mapping[str, Any],
    metadata: Metadata,
    frame: Body,
    device: Any,
    fold: bool,
) -> tuple[Metadata, dict[str, Any], tuple[str, ...]]:
    """Decide about folding and record the golden answer of the network as it will be served."""
    import torch

    from serve.compare.detections import Tolerances
    from serve.runtime.detector import Detector, apply_options
    from serve.runtime.fusion import find_fusable
    from serve.runtime.selftest import matches, run_golden_frame

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
        # Networks of points feed what their convolutions put out to kernels that insist on the usual order.
        network.to(memory_format=torch.contiguous_format)
        plain, metadata = (
            replace(said, inference=replace(said.inference, channels_last=False))
            for said in (plain, metadata)
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
        return (
            metadata,
            unfolded,
            (*notes, f"batch norms are not folded: the model cannot run then ({error})"),
        )
    tolerances = Tolerances(box_m=FOLDING_BOX_M, box_px=FOLDING_BOX_PX, yaw_rad=1e-3, score=FOLDING_SCORE)
    same, found = matches(unfolded, folded, tolerances)
    if not same:
        return (
            metadata,
            unfolded,
            (*notes, f"batch norms are not folded: it changed the golden frame ({found.verdict()})"),
        )
    return replace(metadata, inference=replace(folding, autocast=metadata.inference.autocast)), folded, notes


def _golden(conversion: Conversion, spec: FrameSpec) -> tuple[str | dict[str, str], Any]:
    """Entry names and bytes of the golden frame, by part where it has several."""
    if conversion.golden_frame is None:
        made = golden.golden_frame(spec)
    else:
        try:
            made = golden.read_frame(conversion.golden_frame, spec)
        except OSError as error:
            raise ArchiveError(f"the golden frame cannot be read: {error}") from None
    if len(made) == 1:
        (((file, body)),) = made.values()
        return f"golden/{file}", body
    return (
        {part: f"golden/{file}" for part, (file, _) in made.items()},
        {part: body for part, (_, body) in made.items()},
    )


def configured_classes(config: Mapping[str, Any]) -> Sequence[str]:
    """Class names a resolved config gives: in its metainfo, or by its data set's class; empty if neither."""
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]
    for place in (dataset.get("metainfo"), config.get("metainfo"), {"classes": config.get("class_names")}):
        if place and (classes := place.get("classes") or place.get("CLASSES")):
            return tuple(classes)
    return _dataset_classes(dataset.get("type"), str(config["default_scope"]))


def _dataset_classes(dataset_type: Any, scope: str) -> Sequence[str]:
    """The METAINFO of the data set class, without building it (which would read annotations)."""
    from serve.runtime.model import suppress_warnings

    if not dataset_type:
        return ()
    with suppress_warnings():
        registry = importlib.import_module(f"{scope}.registry").DATASETS
        found = registry.get(dataset_type)
    metainfo = getattr(found, "METAINFO", None) or {}
    return tuple(metainfo.get("classes") or ())


def _source(conversion: Conversion) -> dict[str, str]:
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


def _extra(files: Sequence[Path]) -> dict[str, Source]:
    names = [file.name for file in files]
    if len(set(names)) != len(names):
        raise ArchiveError(f"extra files must have different names, got {', '.join(names)}")
    for file in files:
        if not file.is_file():
            raise ArchiveError(f"extra file {file} does not exist")
    return {file.name: file for file in files}


def _custom_code(config: Mapping[str, Any]) -> dict[str, Source]:
    """Sources of the modules in custom_imports that the serving machine would not have."""
    imports = (config.get("custom_imports") or {}).get("imports") or []
    code: dict[str, Source] = {}
    installed = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")]
    for module in [imports] if isinstance(imports, str) else imports:
        top = module.partition(".")[0]
        spec = importlib.util.find_spec(top)
        if spec is None:
            raise ArchiveError(
                f"custom_imports names {module}, which cannot be imported; put it on PYTHONPATH"
            )
        for location in spec.submodule_search_locations or ([spec.origin] if spec.origin else []):
            place = Path(location).resolve()
            if any(place.is_relative_to(root) for root in installed):
                continue  # a package: the serving machine installs it
            if place.is_file():
                code[place.name] = place
            else:
                code.update(
                    {f"{top}/{f.relative_to(place).as_posix()}": f for f in sorted(place.rglob("*.py"))}
                )
    return code
