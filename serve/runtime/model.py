"""Construction of networks from a resolved config and weights."""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from serve import ops
from serve.errors import ArchiveError, CheckpointError, SettingsError
from serve.runtime.custom_code import explain_missing
from serve.runtime.object_paths import resolve_objects
from serve.runtime.patches import patch, use_torch_sync_bn
from serve.runtime.registry_guard import restrict_registry

__all__ = [
    "build_network",
    "device_for",
    "import_package",
    "is_segmentor",
    "load_state_dict_strict",
    "parse_device",
    "scope_of",
    "strip_pretrained",
    "suppress_warnings",
]


def device_for(gpu_id: int | str | None) -> torch.device:
    """Return the device of TorchServe's ``gpu_id``; the CPU if it is None or CUDA is unavailable."""
    if gpu_id is None or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(gpu_id))


def parse_device(name: str) -> torch.device:
    """Return the device that a command's ``--device`` names: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        SettingsError: it names another kind of device, or a GPU that this process cannot use.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if found is None:
        raise SettingsError(f"device must be cpu or cuda:N, got {name!r}")
    if name != "cpu":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(found[1] or 0) >= count:
            usable = "only " + ", ".join(f"cuda:{i}" for i in range(count)) if count else "no GPU"
            raise SettingsError(f"device {name} is not available: torch {torch.__version__} sees {usable}")
    return torch.device(name)


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress warnings of OpenMMLab's code about its own deprecations, on which users cannot act."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def scope_of(config: Mapping[str, Any]) -> str:
    """Return the registry scope of a config, ``"mmdet"`` or ``"mmdet3d"``."""
    return str(config.get("default_scope") or "mmdet")


def strip_pretrained(config: Any) -> Any:
    """Deep-copy a config without ``init_cfg=dict(type='Pretrained', …)``, which would download weights."""
    if isinstance(config, Mapping):
        return {key: strip_pretrained(value) for key, value in config.items() if not _fetches(key, value)}
    if isinstance(config, list | tuple):
        return type(config)(strip_pretrained(value) for value in config)
    return copy.copy(config)


def _fetches(key: str, value: Any) -> bool:
    if key in ("pretrained", "teacher_ckpt"):  # a teacher is used in training only
        return isinstance(value, str) or value is True  # timm's models know their own URLs
    # Some backbones, such as PVT, take a checkpoint without type='Pretrained'.
    return key == "init_cfg" and isinstance(value, Mapping) and "checkpoint" in value


def import_package(package: str) -> None:
    """Import the modules in which ``mmdet`` or ``mmdet3d`` define what a config of theirs builds."""
    ops.install()
    with suppress_warnings():
        from serve.storage import backends  # noqa: F401  (pipelines may read through s3:// or packed files)

        for module in ("apis", "models", "datasets.transforms", "structures"):
            importlib.import_module(f"{package}.{module}")


def build_network(config: Mapping[str, Any], classes: Sequence[str]) -> nn.Module:
    """Build ``config['model']`` on the CPU in evaluation mode, with initial weights.

    The steps are those of `mmdet3d.apis.init_model` and `mmdet.apis.init_detector`, without reading files, building
    data sets or touching CUDA. A config is untrusted data: only registered classes can be built from it.

    Args:
        config: resolved config.
        classes: class names by label.
    """
    ops.install()
    with suppress_warnings():
        from mmengine.config import Config
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import DefaultScope, init_default_scope

        from serve.storage import backends  # noqa: F401  (see `import_package`)

        restrict_registry()
        if scope_of(config) not in ("mmdet", "mmdet3d"):
            raise ArchiveError(f"default_scope must be mmdet or mmdet3d, got {scope_of(config)[:200]!r}")
        init_default_scope(scope_of(config))
        with DefaultScope.overwrite_default_scope(scope_of(config)):
            built = {**config, "model": resolve_objects(config["model"])}
            network = _build(Config(strip_pretrained(built)), scope_of(config))
        network = revert_sync_batchnorm(network)
        network.cfg = Config(dict(config))
    patch(network)
    network.dataset_meta = {"classes": tuple(classes)}
    network.eval()
    return network  # type: ignore[no-any-return]


def _build(config: Any, scope: str) -> Any:
    model = config.model
    if scope == "mmdet3d":
        from mmdet3d.apis.inference import convert_SyncBN
        from mmdet3d.registry import MODELS

        convert_SyncBN(model)
    else:
        from mmdet.registry import MODELS
    if "train_cfg" in model:  # the wrapper of teacher and student does not accept one
        model.train_cfg = None
    try:
        return MODELS.build(use_torch_sync_bn(model))
    except ArchiveError:
        raise
    except Exception as error:  # a constructor may raise anything on a foreign config
        if missing := explain_missing(error, f"the network {model.get('type')}"):
            raise ArchiveError(missing) from error
        raise ArchiveError(
            f"the network {model.get('type')} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error


def is_segmentor(network: nn.Module) -> bool:
    """Return whether a network labels every point of a cloud instead of detecting boxes."""
    return any(kind.__name__ == "Base3DSegmentor" for kind in type(network).__mro__)


def load_state_dict_strict(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly (only the counters of batch norms may be missing).

    Raises:
        CheckpointError: the keys do not match; the message lists them.
    """
    # The weights are from the same class of network. Without its version numbers, modules would treat them as old
    # ones and rename keys.
    versioned = OrderedDict(weights)
    versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    found = network.load_state_dict(versioned, strict=False)
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"the weights do not fit the config: missing {missing or 'none'}, "
            f"unexpected {found.unexpected_keys or 'none'}"
        )
