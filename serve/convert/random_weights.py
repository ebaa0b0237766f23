"""Checkpoints of random weights with the activation statistics of trained ones, for tests and timing.

Freshly initialised detectors are poor test subjects: activations vanish or explode, all scores are equal, and rounding
decides which boxes survive. So one forward pass over a golden frame sets each batch norm to the observed statistics and
scales each output layer to a useful spread, each before the layers behind it see anything (layer-sequential unit
variance, Mishkin and Matas, ICLR 2016).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from serve.convert.golden import golden_frame, read_frame
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.runtime.model import build_network, suppress_warnings
from serve.runtime.pipeline import InputPipeline
from serve.runtime.random_state import fixed_seed
from serve.settings import Limits

__all__ = ["write_random_checkpoint"]

# Of a channel, as a share of its layer's mean.
LEAST_VARIANCE = 0.1
# Layers whose output is a score, a box or a place, by name: how far it reaches from its median, and that median.
# Scores come out between some hundredths and eight tenths without saturating, boxes stay near their anchors.
OUTPUT_LAYERS: tuple[tuple[re.Pattern[str], float, float], ...] = (
    (re.compile(r"(fc_cls)$"), 6.0, 0.0),
    (re.compile(r"(conv_cls|retina_cls|rpn_cls|cls_logits|rtm_cls(\.\d+)?)$"), 4.0, -3.0),
    (re.compile(r"multi_level_conv_(cls|obj)\.\d+$"), 4.0, -1.0),  # YOLOX
    (re.compile(r"multi_level_conv_reg\.\d+$"), 0.5, 0.0),
    (re.compile(r"(conv_dir_cls|conv_logits)$"), 2.0, 0.0),
    # Where deformable convolutions look, in pixels, and GCNet: far off or all in one place, rounding decides.
    (re.compile(r"conv_offset$"), 1.0, 0.0),
    (re.compile(r"context_block\.conv_mask$"), 2.0, 0.0),
    (re.compile(r"(conv_reg|retina_reg|rpn_reg|fc_reg)$"), 0.5, 0.0),
)
# The last norm of a residual branch (ResNet's bottlenecks, Darknet's), and its weight: with branches as strong as
# what they are added to, every block of a hundred would make more of a rounding.
RESIDUAL = re.compile(r"(\.bn3|\.blocks\.\d+\.conv2(\.pointwise_conv)?\.bn)$")
RESIDUAL_WEIGHT = 0.3


def write_random_checkpoint(
    config: Mapping[str, Any], classes: tuple[str, ...], out: Path, seed: int = 0, frame: Path | None = None
) -> None:
    """Write a checkpoint that fits `config` (resolved), deterministic in `seed` and `frame`.

    The file holds ``state_dict`` and ``meta.dataset_meta.classes``, as mmengine's own do. The norms of a deep
    network that are set on one image can amplify an image of another scale a thousandfold (YOLOX): pass the frame that
    the model will be run on as `frame`.

    Args:
        config: a resolved config.
        classes: class names by label.
        out: the file to write.
        seed: of the initialisation.
        frame: the frame that norms and output layers are set on; None for the golden frame of the modality.
    """
    with torch.random.fork_rng(), suppress_warnings():
        torch.manual_seed(seed)
        network = build_network(config, classes)
        _initialise(network)
        _calibrate(network, config, frame)
    torch.save({"state_dict": network.state_dict(), "meta": {"dataset_meta": {"classes": classes}}}, out)


def _initialise(network: Any) -> None:
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")  # INFO logs every tensor
    try:
        network.init_weights()
    finally:
        logger.setLevel(level)


def _calibrate(network: nn.Module, config: Mapping[str, Any], frame: Path | None) -> None:
    from mmcv.ops import MaskedConv2d
    from mmengine.dataset import pseudo_collate

    samples = InputPipeline(config)
    parts = golden_frame(samples.spec) if frame is None else read_frame(frame, samples.spec)
    body = {part: made for part, (_, made) in parts.items()}
    with fixed_seed(torch.device("cpu")):
        sample = samples.build(decode_frame(body, samples.spec, FrameOptions(), Limits()))
    views = [sample]
    alone = any(isinstance(module, MaskedConv2d) for module in network.modules())  # takes no batch
    if isinstance(sample["inputs"], Tensor) and not alone:
        # An image: norms set on one alone do not fit its mirror image.
        views.append({**copy.deepcopy(sample), "inputs": sample["inputs"].flip(-1)})
    hooks = []
    network.eval()
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(_standardize(len(views))))
            # ResNets initialise the last norm of a branch with zero, which switches the branch off.
            if module.affine and (RESIDUAL.search(name) or not module.weight.any()):
                module.weight.data.fill_(RESIDUAL_WEIGHT)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            target = next(((std, bias) for pattern, std, bias in OUTPUT_LAYERS if pattern.search(name)), None)
            if target:
                hooks.append(module.register_forward_hook(_spread(*target)))
    with torch.no_grad(), fixed_seed(torch.device("cpu")):
        network.test_step(pseudo_collate(views))  # type: ignore[operator]
    for handle in hooks:
        handle.remove()


def _standardize(frames: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """Create a hook that sets a batch norm, on its first call, to the statistics of what it is given.

    The norm itself computes with them as in evaluation, so that the layers behind it are set on what they will get: of
    a hundred norms that standardise exactly here and with bounded variances later, the last would be far off.
    """
    done: set[int] = set()

    def hook(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)  # channels first
        # One value of a frame has no variance: such a norm (ResNeSt's, after a mean over the image) keeps its own.
        if norm.running_var is None or id(norm) in done or values.shape[1] <= frames:
            return
        done.add(id(norm))
        variance, mean = torch.var_mean(values, 1)
        norm.running_mean.copy_(mean)
        # A channel that hardly moves on this frame would blow up another's, and every rounding with it.
        norm.running_var.copy_(variance.clamp(min=float(variance.mean()) * LEAST_VARIANCE))

    return hook


def _spread(reach: float, median: float) -> Callable[[Any, Any, Tensor], Tensor]:
    """Create a hook that scales a layer on its first call, so that its output has this reach and median."""
    done: set[int] = set()

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if id(layer) not in done:
            done.add(id(layer))
            if layer.bias is not None:
                layer.bias.zero_()
            plain = layer.forward(inputs[0])
            middle = plain.median()
            scale = reach / max(float((plain - middle).abs().max()), 1e-12)
            layer.weight.mul_(scale)
            if layer.bias is not None:
                layer.bias.fill_(median - scale * float(middle))
        return layer.forward(inputs[0])  # type: ignore[no-any-return]

    return hook
