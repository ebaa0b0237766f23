"""Fusion of convolutions with the batch norms and ReLUs behind them: fewer passes over memory, the same function.

Batch norms are folded into weights; then convolutions with one-pass kernels are replaced
(`serve.runtime.fused_conv`, `serve.runtime.fused_sparse_conv`).

The order of attributes does not determine the order of calls, so pairs are observed in a forward run: a norm is fusable
if in every call its input is the very tensor that one convolution returned, and its output that of a batch norm.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from serve import ops
from serve.runtime.model import suppress_warnings

__all__ = ["find_fusable", "fuse", "plain_convolutions"]

Pair = tuple[str, str]


def find_fusable(network: nn.Module, run: Callable[[], object]) -> tuple[Pair, ...]:
    """Find the names of fusable (convolution, batch norm) pairs; `run` must call the network."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    fed_by: dict[str, set[str | None]] = {}
    norm_calls: Counter[str] = Counter()
    conv_calls: Counter[str] = Counter()
    hooks = []

    def conv_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output.features
            outputs[id(tensor)] = (name, tensor)  # the reference prevents reuse of the id
            conv_calls[name] += 1

        return hook

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            source = outputs.get(id(inputs[0])) if _is_only_norm(module, inputs[0], output) else None
            fed_by.setdefault(name, set()).add(source[0] if source else None)
            norm_calls[name] += 1

        return hook

    for name, module in network.named_modules():
        if _is_convolution(module):
            hooks.append(module.register_forward_hook(conv_hook(name)))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_hook(norm_hook(name)))
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    fed_only_by = {norm: next(iter(sources)) for norm, sources in fed_by.items() if len(sources) == 1}
    users: dict[str, list[str]] = {}
    for norm, sources in fed_by.items():
        for conv in sources - {None}:
            users.setdefault(str(conv), []).append(norm)
    pairs = []
    for conv, norms in users.items():
        calls_agree = conv_calls[conv] == sum(norm_calls[norm] for norm in norms)
        if not calls_agree or any(fed_only_by.get(norm) != conv for norm in norms):
            continue
        if len(norms) == 1:
            pairs.append((conv, norms[0]))
        else:
            pairs += _pairs_of_shared(network, conv, norms)
    return tuple(sorted(pairs))


def _is_only_norm(norm: Any, features: Any, output: Any) -> bool:
    """Whether a layer normalised and did nothing else: timm's batch norms hold an activation as well."""
    plain = nn.functional.batch_norm(
        features, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
    )
    return isinstance(output, Tensor) and torch.allclose(output, plain)


def _pairs_of_shared(network: nn.Module, conv: str, norms: Sequence[str]) -> list[Pair]:
    """Pair each norm of a shared convolution with the attribute of the convolution beside it, if every norm has one.

    RTMDet's levels share convolutions and have norms of their own.
    """
    modules = dict(network.named_modules())
    pairs = []
    for norm in norms:
        parent = norm.rpartition(".")[0]
        beside = [name for name, child in modules[parent]._modules.items() if child is modules[conv]]
        if len(beside) != 1:
            return []
        pairs.append((f"{parent}.{beside[0]}" if parent else beside[0], norm))
    return pairs


def fuse(network: nn.Module, pairs: Iterable[Pair]) -> None:
    """Fuse each pair in place; the norm becomes an identity. A convolution of several pairs becomes several.

    Raises:
        KeyError: a name is not in the network.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    pairs = tuple(pairs)
    users = Counter(id(modules[conv_name]) for conv_name, _ in pairs)
    folded: set[int] = set()
    for conv_name, norm_name in pairs:
        conv, norm = modules[conv_name], modules[norm_name]
        if users[id(conv)] > 1:
            conv = copy.deepcopy(conv)
            _replace(modules, conv_name, conv)
        _fuse_norm(conv, norm)
        folded.add(id(conv))
        _replace(modules, norm_name, nn.Identity())
    if not pairs:
        return
    _skip_background(network)
    _fuse_dense(network, folded)
    _fuse_blocks(network)
    if ops.kernels_in_use() == "portable":  # a compiled extension has its own sparse kernels
        _fuse_sparse(network)


def _fuse_blocks(network: nn.Module) -> None:
    """Compute convolution, bias, residual and ReLU of known parts in one pass, and select boxes by the best logits."""
    with suppress_warnings():
        from serve.runtime import dense_selection, fused_blocks, region_features

        fused_blocks.fuse_blocks(network)
        if all(weight.device.type == "cpu" for weight in network.parameters()):
            dense_selection.install(network)
            region_features.install(network)


def _replace(modules: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(modules[parent], child, module)


def _skip_background(network: nn.Module) -> None:
    """Let networks of voxels skip padding and, behind the encoder, background, and voxelize at once; on the CPU."""
    if any(hasattr(network, f"{prefix}middle_encoder") for prefix in ("", "pts_")):
        with suppress_warnings():
            from serve.runtime import background, point_rows, voxelizer

            background.install(network)
            point_rows.install(network)
            if all(weight.device.type == "cpu" for weight in network.parameters()):
                voxelizer.install(network)


def _fuse_dense(network: nn.Module, folded: set[int]) -> None:
    """Replace the `folded` convolutions (ids) in plain sequences by `FusedConv`, if it supports them."""
    from serve.runtime.fused_conv import FusedConv, supports

    for parent in list(network.modules()):
        if type(parent).forward is nn.Sequential.forward:
            for name, layer in list(parent.named_children()):
                if id(layer) in folded and isinstance(layer, nn.Conv2d) and supports(layer):
                    relu = _take_next_relu(parent, name)
                    setattr(parent, name, FusedConv(layer, relu=relu))


def _fuse_sparse(network: nn.Module) -> None:
    """Replace every sparse convolution by `FusedSparseConv`, with the next ReLU of a sequence."""
    from mmcv.ops.sparse_conv import SparseConvolution
    from mmcv.ops.sparse_modules import SparseSequential

    if not any(isinstance(layer, SparseConvolution) for layer in network.modules()):
        return
    with suppress_warnings():
        from mmdet3d.models.middle_encoders import SparseEncoder, SparseUNet

    from serve.runtime.fused_sparse_conv import FusedSparseConv, VoxelPlan

    plan = VoxelPlan()
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, SparseConvolution) and not layer.conv1x1:
                relu = type(parent).forward is SparseSequential.forward and _take_next_relu(parent, name)
                setattr(parent, name, FusedSparseConv(layer, relu=relu, plan=plan))
    _fuse_sparse_blocks(network)
    for encoder in network.modules():
        # The output of these encoders is only viewed as a bird's-eye-view map.
        if isinstance(encoder, SparseEncoder | SparseUNet):
            for layer in encoder.conv_out.children():
                if isinstance(layer, FusedSparseConv):
                    layer.ends_in_map = True


def _fuse_sparse_blocks(network: nn.Module) -> None:
    """Add the residual of mmdet3d's SparseBasicBlock, and apply its ReLUs, within its convolutions."""
    from mmdet3d.models.layers import SparseBasicBlock

    from serve.runtime.fused_sparse_conv import FusedSparseBasicBlock, FusedSparseConv

    block: Any
    for block in network.modules():
        if type(block) is SparseBasicBlock and type(block.relu) is nn.ReLU:
            convolutions = (block.conv1, block.conv2)
            folded = all(type(norm) is nn.Identity for norm in (block.norm1, block.norm2))
            if folded and all(isinstance(layer, FusedSparseConv) for layer in convolutions):
                for layer in convolutions:
                    layer.relu = True
                block.__class__ = FusedSparseBasicBlock


def _take_next_relu(parent: nn.Module, name: str) -> bool:
    """Replace the ReLU behind child `name` of a sequence (skipping identities) by an identity; return if found."""
    followers = iter(parent.named_children())
    while next(followers)[0] != name:
        pass
    for follower, layer in followers:
        if type(layer) is nn.ReLU:
            setattr(parent, follower, nn.Identity())
            return True
        if not isinstance(layer, nn.Identity):
            return False
    return False


@torch.no_grad()
def _fuse_norm(conv: Any, norm: Any) -> None:
    """Fold ``norm(conv(x)) = scale * (W x + b - mean) + shift`` into the convolution, in float64."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = norm.bias.double() if norm.bias is not None else torch.zeros_like(mean)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(mean)
    conv.weight.copy_(_scale_weight(conv, scale))
    folded = (scale * (bias - mean) + shift).to(conv.weight.dtype)
    conv.bias = nn.Parameter(folded, requires_grad=conv.weight.requires_grad)


def _scale_weight(conv: Any, scale: Tensor) -> Tensor:
    """Scale the output channels of the weight, according to its layout."""
    weight: Tensor = conv.weight.double()
    if isinstance(conv, nn.ConvTranspose2d):  # (in, out / groups, k, k)
        per_group = scale.view(conv.groups, 1, -1).expand(-1, conv.in_channels // conv.groups, -1)
        return weight * per_group.reshape(conv.in_channels, -1)[:, :, None, None]
    if isinstance(conv, nn.Conv2d):  # (out, in / groups, k, k)
        return weight * scale[:, None, None, None]
    return weight * scale  # sparse: (k, …, in, out)


def _is_convolution(module: nn.Module) -> bool:
    """Return whether `module` is a plain convolution; a subclass may transform its weight (standardisation)."""
    from mmcv.ops.sparse_conv import SparseConvolution

    return type(module) in plain_convolutions() or isinstance(module, SparseConvolution)


@cache
def plain_convolutions() -> tuple[type[nn.Module], ...]:
    """Return the classes of convolutions that use their weight as it is."""
    from mmcv.cnn.bricks import wrappers

    return nn.Conv2d, nn.ConvTranspose2d, wrappers.Conv2d, wrappers.ConvTranspose2d
