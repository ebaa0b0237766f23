"""Loading of a reference model: config and checkpoint, built by mmdet's and mmdet3d's own functions."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.errors import ArchiveError, CheckpointError, SetupError
from serve.settings.environment import variable_set
from serve.verify import upstream
from serve.verify.reference import ReferenceModel, suppress_warnings

if TYPE_CHECKING:
    from serve.convert.checkpoint import Checkpoint

__all__ = ["choose_device", "load_reference"]


def load_reference(
    config: str | Path,
    checkpoint: str | Path,
    device: str | None = None,
    *,
    classes: Sequence[str] = (),
    allow_partial: bool = False,
    trust_checkpoint: bool = False,
) -> ReferenceModel:
    """Build a model with mmdet's / mmdet3d's own functions.

    Config and class names are read as a conversion reads them (`serve.convert`): old configs, class names by option.

    Args:
        config: path of a config file, or a name in the model zoo (pre-1.0 names too).
        checkpoint: path of a checkpoint. Read with ``weights_only=True`` and an allow-list of types.
        device: ``cpu`` or ``cuda:N``; if None, ``cuda:0`` if available, as in TorchServe.
        classes: class names by label, in place of those of checkpoint and config.
        allow_partial: continue when weights are missing or unexpected; missing ones are those of a conversion.
        trust_checkpoint: unpickle any type in the checkpoint.

    Raises:
        ModelLookupError: no such config.
        CheckpointError: the checkpoint is missing, rejected, or does not fit the config.
        SetupError: the model cannot be built, or is of an unsupported kind.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"checkpoint {checkpoint} does not exist; check the path")
    device = choose_device(device)

    import torch

    import serve.ops

    serve.ops.install()
    from serve.runtime.model import is_segmentor
    from serve.runtime.pipeline import box_type_of, frame_spec

    with suppress_warnings():
        from mmengine.config import Config

        from serve.convert.blame import blaming
        from serve.convert.checkpoint import load_checkpoint
        from serve.convert.classes import check_against_head, find_class_names
        from serve.convert.config import read_config, reduce_config
        from serve.runtime.object_paths import resolve_objects
        from serve.storage import backends  # noqa: F401  (registers s3:// and packed files with mmengine)

        path = _resolve_path(config)
        whole = read_config(path)
        reduced = reduce_config(whole, path)
        scope = reduced.package
        # The data set without wrappers and test-time augmentation, which upstream's functions do not take.
        parsed = Config(
            {
                **whole.full,
                "default_scope": scope,
                "model": resolve_objects(whole.full["model"]),
                "backend_args": None,  # given to every step that has none (serve.storage.config_backend)
                "test_dataloader": _reading_locally(resolve_objects(reduced.config["test_dataloader"])),
            }
        )
    read = load_checkpoint(Path(checkpoint), trust=trust_checkpoint)
    with blaming(f"config {path}"):
        named = find_class_names(reduced.config, read.classes or (), classes)
        check_against_head(named, reduced.config["model"])
    output = io.StringIO()
    with (
        suppress_warnings(),
        contextlib.redirect_stdout(output),
        _readable_checkpoint(trust=trust_checkpoint),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)  # of weights that the checkpoint lacks, as in a conversion
        try:
            module = upstream.build(parsed, Path(checkpoint), device)
        except Exception as error:
            kind = CheckpointError if "load" in str(error).lower() else SetupError
            raise kind(f"{scope} cannot build {path} with {checkpoint}: {error}") from error
    fits = "do not match exactly" not in output.getvalue()
    notes = (*reduced.notes, *_adapt_weights(module, read, fits=fits, allow_partial=allow_partial))
    notes = (*notes, *upstream.patch(module))
    module.dataset_meta = {**(getattr(module, "dataset_meta", None) or {}), "classes": named.names}
    try:
        with blaming(f"config {path}"):
            spec = frame_spec(reduced.config)
    except ArchiveError as error:
        raise SetupError(f"{path} cannot be compared: {error}") from None
    flat = scope == "mmdet" or spec.modality == "image" or is_segmentor(module)
    return ReferenceModel(
        modality=spec.modality,
        classes=named.names,
        box_type_3d=None if flat else box_type_of(reduced.config),
        load_dim=spec.load_dim if spec.has_points else None,
        module=module,
        notes=notes,
        parts=spec.parts,
        layout=spec.layout if spec.has_points else None,
        sweeps=spec.sweeps,
    )


def _reading_locally(loader: dict[str, Any]) -> dict[str, Any]:
    """Drop the storage that training read from: the frames of a comparison are files of this machine."""
    dataset = loader["dataset"]
    pipeline = [
        {name: value for name, value in step.items() if name not in ("backend_args", "file_client_args")}
        for step in dataset["pipeline"]
    ]
    # mmdet3d creates the data set for its colours, without reading the annotations that a converted config lacks.
    missing = {"data_root": ""} if "ann_files" in dataset else {"data_root": "", "ann_file": ""}
    return {**loader, "dataset": {**missing, **dataset, "pipeline": pipeline}}


def _resolve_path(config: str | Path) -> Path:
    """Path of a config file, or of the zoo's config of that name."""
    if Path(config).is_file():
        return Path(config)
    from serve import zoo

    return zoo.resolve(config).config_path


def _adapt_weights(module: Any, read: Checkpoint, *, fits: bool, allow_partial: bool) -> tuple[str, ...]:
    """Adapt old kernel layouts and box frames, which mmengine's loader cannot; returns remarks on the changes.

    Without such changes the weights stay as mmengine loaded them, so that the reference is independent of
    `serve.convert`.
    """
    from serve.convert.legacy_weights import adapt_and_load

    loaded = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    report = adapt_and_load(module, read, allow_partial=True)
    if not report.ok and not allow_partial:
        raise CheckpointError(
            f"the checkpoint does not fit the config (--allow-partial compares what fits): "
            f"{' '.join(report.summary(5).split())}"
        )
    notes = report.notes[len(read.notes) :]
    if fits and not notes:
        for name, tensor in module.state_dict().items():  # load_state_dict could rename keys
            tensor.copy_(loaded[name])
    return notes


def choose_device(device: str | None) -> str:
    """Check the name of a device; None stands for ``cuda:0`` if there is one, or else the CPU.

    Raises:
        SetupError: no such device.
    """
    import torch

    if device is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise SetupError(f"{device!r} is not a device; use cpu or cuda:N") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise SetupError(f"device {device} does not exist on this machine; use cpu")
    return device


@contextlib.contextmanager
def _readable_checkpoint(*, trust: bool) -> Iterator[None]:
    """Let mmengine's own loader read OpenMMLab checkpoints with ``weights_only=True``, or any with `trust`."""
    from serve.convert.safe_globals import safe_globals_for_openmmlab

    if not trust:
        with safe_globals_for_openmmlab():
            yield
        return
    with variable_set("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"):  # torch reads it at every call
        yield
