"""From a resolved config and weights to a network in evaluation mode on a device.

Knows nothing about archives, frames or answers.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from serve import ops
from serve.errors import CheckpointError
from serve.runtime.patches import patch, use_torch_sync_bn
from serve.runtime.registry_guard import restrict_registry

__all__ = [
    "build_network",
    "device_for",
    "is_segmentor",
    "load_state_dict_strict",
    "scope_of",
    "strip_pretrained",
    "suppress_warnings",
]


def device_for(gpu_id: int | str | None) -> torch.device:
    """The device TorchServe's ``gpu_id`` means; CPU where it names none or CUDA is not there."""
    if gpu_id is None or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(gpu_id))


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Around OpenMMLab's code: it warns of its own deprecations, which nobody who serves a model can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def scope_of(config: Mapping[str, Any]) -> str:
    """The registry scope (``"mmdet"`` or ``"mmdet3d"``) a config is written for."""
    return str(config.get("default_scope") or "mmdet")


def strip_pretrained(config: Any) -> Any:
    """A deep copy without ``init_cfg=dict(type='Pretrained', …)``: the weights come from the archive, not the net."""
    if isinstance(config, Mapping):
        return {key: strip_pretrained(value) for key, value in config.items() if not _fetches(key, value)}
    if isinstance(config, list | tuple):
        return type(config)(strip_pretrained(value) for value in config)
    return copy.copy(config)


def _fetches(key: str, value: Any) -> bool:
    if key in ("pretrained", "teacher_ckpt"):  # a teacher is of use in training only
        return isinstance(value, str) or value is True  # timm's models know where theirs are
    # A backbone such as PVT takes a checkpoint without saying that it is one of pretrained weights.
    return key == "init_cfg" and isinstance(value, Mapping) and "checkpoint" in value


def build_network(config: Mapping[str, Any], classes: Sequence[str]) -> nn.Module:
    """Build ``config['model']`` on the CPU, in evaluation mode, its weights as constructed.

    The same steps as `mmdet3d.apis.init_model` and `mmdet.apis.init_detector`, without reading files,
    building data sets or touching CUDA. A config is data: only what is registered can be built from it.

    Args:
        config: a resolved config.
        classes: class names by label.
    """
    ops.install()
    with suppress_warnings():
        from mmengine.config import Config
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import DefaultScope, init_default_scope

        from serve.storage import backends  # noqa: F401  (pipelines may read through s3:// or packed files)

        restrict_registry()
        init_default_scope(scope_of(config))
        with DefaultScope.overwrite_default_scope(scope_of(config)):
            network = _build(Config(strip_pretrained(config)), scope_of(config))
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
    if "train_cfg" in model:  # a teacher's and student's wrapper has none, and refuses one
        model.train_cfg = None
    return MODELS.build(use_torch_sync_bn(model))


def is_segmentor(network: nn.Module) -> bool:
    """Whether a network labels every point of a cloud instead of finding boxes."""
    return any(kind.__name__ == "Base3DSegmentor" for kind in type(network).__mro__)


def load_state_dict_strict(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly (only the counters of batch norms may be missing).

    Raises:
        CheckpointError: it does not fit; lists the keys.
    """
    # The weights are of this very class of network: without its version numbers, modules take them for old
    # ones and rename what needs no renaming.
    versioned = OrderedDict(weights)
    versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    found = network.load_state_dict(versioned, strict=False)
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"the weights do not fit the config: missing {missing or 'none'}, "
            f"unexpected {found.unexpected_keys or 'none'}"
        )
