"""Arithmetic of synchronized batch normalization; mmcv's Python sums over the processes.

The reference is mmcv 2.1.0 `csrc/common/cuda/sync_bn_cuda_kernel.cuh`. Sums are in float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.checks import check_floating, check_rank, check_tensor

__all__ = [
    "sync_bn_backward_data",
    "sync_bn_backward_param",
    "sync_bn_forward_mean",
    "sync_bn_forward_output",
    "sync_bn_forward_var",
]


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write the mean of each channel of `input` (N, C, S) into `mean` (C,)."""
    _check("input", input, mean=mean)
    mean.copy_(input.float().mean(dim=(0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write the mean squared distance of each channel of `input` (N, C, S) from `mean` (C,) into `var` (C,)."""
    _check("input", input, mean=mean, var=var)
    var.copy_((input.float() - mean[:, None]).square_().mean(dim=(0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Normalize, and update the running statistics.

    Args:
        input: (N, C, S).
        mean: (C,) mean over all processes.
        var: (C,) variance over all processes.
        weight: (C,) factors.
        bias: (C,) offsets.
        running_mean: (C,), updated in place towards `mean`.
        running_var: (C,), updated in place towards the unbiased variance.
        norm: float32 of the shape of `input`, written in place: the result before weight and bias.
        std: (C,), written in place.
        output: as `input`, written in place.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics.
        group_size: number of processes.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    running = {"running_mean": running_mean, "running_var": running_var} if running_mean.numel() > 0 else {}
    _check(
        "input", input, "norm", "output",
        mean=mean, var=var, weight=weight, bias=bias, std=std, norm=norm, output=output, **running,
    )  # fmt: skip
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    output.copy_(norm * weight.detach()[:, None] + bias.detach()[:, None])
    if running_mean.numel() > 0:
        count = input.shape[0] * input.shape[2] * group_size
        unbiased = var * count / (count - 1) if count > 1 else var
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        running_var.copy_(momentum * unbiased + (1 - momentum) * running_var)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write the gradients of weight and bias (C,), given those of the output (N, C, S) and `norm`."""
    _check("grad_output", grad_output, "norm", norm=norm, grad_weight=grad_weight, grad_bias=grad_bias)
    grad_weight.copy_((grad_output.float() * norm).sum(dim=(0, 2)))
    grad_bias.copy_(grad_output.float().sum(dim=(0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Write the gradient of the input (N, C, S), given those of output, weight and bias, `norm` and `std`."""
    _check(
        "grad_output", grad_output, "norm", "grad_input",
        weight=weight, grad_weight=grad_weight, grad_bias=grad_bias, norm=norm, std=std, grad_input=grad_input,
    )  # fmt: skip
    count = grad_output.shape[0] * grad_output.shape[2]
    mean = (grad_weight[:, None] * norm + grad_bias[:, None]) / max(count, 1)
    scale = weight.detach()[:, None].to(torch.float32) / std[:, None]
    grad_input.copy_(scale * (grad_output.float() - mean))


def _check(name: str, tensor: Tensor, *like: str, **others: Tensor) -> None:
    """Raise unless `tensor` is (N, C, S), the `others` named in `like` too, and the rest are (C,)."""
    check_rank(name, tensor, 3)
    check_floating(**{name: tensor})
    for other, value in others.items():
        check_tensor((name, tensor), other, value, *(tensor.shape if other in like else tensor.shape[1:2]))
