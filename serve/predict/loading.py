"""Models by name: a zoo name or config becomes an archive first, as ``mmdet3d-serve archive`` makes it.

Predictions in process thereby come from what a server would serve: the same batch norms folded, the same golden frame
proved. Archives are kept in the cache, so that only the first run makes one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import orjson

from serve import __version__, storage, zoo
from serve.archive import config_json
from serve.errors import SettingsError
from serve.predict.models import LocalModel, open_archive
from serve.settings import Settings
from serve.storage.hashes import sha256_of
from serve.zoo.config_source import local_config

__all__ = ["ModelArchive", "archive_of", "load_model"]

_PACKAGES = ("torch", "mmengine", "mmdet", "mmdet3d")


def _discard(step: str) -> None:
    del step


def load_model(
    model: str | Path,
    checkpoint: str | Path | None = None,
    *,
    device: str | None = None,
    random_weights: bool = False,
    classes: Sequence[str] = (),
    allow_partial: bool = False,
    trust_checkpoint: bool = False,
    report: Callable[[str], None] = _discard,
) -> LocalModel:
    """Load a model into this process.

    Args:
        model: path or URI of an archive (``.mar``) or of a config, or a name of the zoo.
        checkpoint: path or URI of the weights; the zoo's published ones if None.
        device: ``cpu`` or ``cuda:N``; the first GPU if None, else the CPU.
        random_weights: take random weights, which find nothing real, instead of a checkpoint.
        classes: class names by label, in place of those of checkpoint and config.
        allow_partial: continue when weights are missing or unexpected.
        trust_checkpoint: unpickle any type in the checkpoint, which can run code.
        report: called with a line at the start of each step.

    Returns:
        The model, to be closed; also a context manager.

    Raises:
        SetupError: it cannot be found, converted or loaded.
    """
    found = archive_of(
        model,
        checkpoint,
        device=device,
        random_weights=random_weights,
        classes=classes,
        allow_partial=allow_partial,
        trust_checkpoint=trust_checkpoint,
        report=report,
    )
    report(f"loading {found.path.name}")
    return open_archive(found.path, device, trust_code=found.trust)


@dataclass(frozen=True)
class ModelArchive:
    """An archive on this machine.

    Attributes:
        path: the ``.mar``.
        trust: whether the code in it is the caller's own.
    """

    path: Path
    trust: bool


def archive_of(
    model: str | Path,
    checkpoint: str | Path | None = None,
    *,
    device: str | None = None,
    random_weights: bool = False,
    classes: Sequence[str] = (),
    allow_partial: bool = False,
    trust_checkpoint: bool = False,
    report: Callable[[str], None] = _discard,
) -> ModelArchive:
    """Return the archive of a model, which is made if there is none yet; arguments and errors of `load_model`."""
    name = str(model)
    settings = Settings.from_environment()
    cache = storage.Cache(settings.cache_dir, settings.cache_max_bytes)
    if name.lower().endswith(".mar"):
        if checkpoint is not None or random_weights:
            raise SettingsError(
                f"{name} is an archive with its weights; leave out --checkpoint and --random-weights"
            )
        return ModelArchive(storage.local_path(name, cache), trust=False)
    if checkpoint is not None and random_weights:
        raise SettingsError("--checkpoint and --random-weights exclude each other")
    with ExitStack() as stack:
        entry = zoo.resolve(stack.enter_context(local_config(name)))
        if random_weights:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmdet3d-serve-random-")))
            report("making random weights")
            weights = _random_checkpoint(entry.config_path, folder / "random.pth", classes)
        else:
            source = str(checkpoint) if checkpoint is not None else zoo.require_weights_url(entry)
            report(f"fetching {storage.parse(source)}" if storage.is_remote(source) else f"reading {source}")
            weights = storage.local_path(
                source, cache, sha256=entry.sha256_prefix if checkpoint is None else None
            )
        return _archive(
            _Wanted(entry.config_path, weights, entry.name, tuple(classes), allow_partial, trust_checkpoint),
            settings.cache_dir.expanduser() / "archives",
            device,
            report,
        )


@dataclass(frozen=True)
class _Wanted:
    config: Path
    checkpoint: Path
    name: str
    classes: tuple[str, ...]
    allow_partial: bool
    trust_checkpoint: bool


def _archive(wanted: _Wanted, kept: Path, device: str | None, report: Callable[[str], None]) -> ModelArchive:
    """Return the archive of config and checkpoint: a kept one, or a new one.

    The caller's own code in it is trusted: it is on this machine. Such an archive is made anew each time, because what
    its modules import is not in the key.
    """
    from serve.convert import Conversion, convert

    path = kept / _key(wanted) / f"{wanted.name}.mar"
    if path.is_file():
        return ModelArchive(path, trust=False)
    made = convert(
        Conversion(
            wanted.config,
            wanted.checkpoint,
            path.parent,
            wanted.name,
            device=device or "cpu",
            force=True,
            allow_partial=wanted.allow_partial,
            trust_checkpoint=wanted.trust_checkpoint,
            classes=wanted.classes,
            report=report,
        )
    )
    for note in made.notes:
        report(f"note: {note}")
    if made.needs_trust:
        path = path.replace(path.with_name(f"{wanted.name}.own-code.mar"))
    return ModelArchive(path, made.needs_trust)


def _key(wanted: _Wanted) -> str:
    """Name everything that the archive depends on."""
    from serve.convert import resolve_config

    parts = (
        __version__,
        *(importlib.metadata.version(package) for package in _PACKAGES),
        orjson.dumps(
            config_json.to_json(resolve_config(wanted.config).config), option=orjson.OPT_SORT_KEYS
        ).decode(),
        sha256_of(wanted.checkpoint),
        *wanted.classes,
        str(wanted.allow_partial),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _random_checkpoint(config: Path, path: Path, classes: Sequence[str]) -> Path:
    from serve.convert import configured_classes, resolve_config
    from serve.convert.random_weights import write_random_checkpoint

    resolved = resolve_config(config).config
    write_random_checkpoint(resolved, tuple(classes) or tuple(configured_classes(resolved)), path)
    return path
