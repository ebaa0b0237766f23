"""Focal losses (Lin et al., ICCV 2017) over sigmoid and softmax scores, and their gradients.

Inference does not use them; mmdet's losses do, so that training steps work on these kernels. mmcv's Python does the
reductions. The reference is mmcv 2.1.0 `csrc/common/cuda/sigmoid_focal_loss_cuda_kernel.cuh` and
`softmax_focal_loss_cuda_kernel.cuh`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.checks import check_floating, check_rank, check_same_device, check_shape, compute_dtype

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]

# Smallest normal float32: the reference's lower bound of arguments of logarithms.
SMALLEST = torch.finfo(torch.float32).tiny


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of each logit into `output`.

    Args:
        input: (N, C) logits.
        target: (N,) int64 classes; C and negative ones are background.
        weight: (C,) factor per class of the target, or empty for none.
        output: (N, C), written in place.
        gamma: focusing exponent, which lowers the weight of easy examples.
        alpha: factor of positives; negatives get 1 - alpha.

    Raises:
        ValueError: a shape does not fit.
        IndexError: a target is out of range, or is background while there are weights.
    """
    factor = _check(input, target, weight, background=True)
    _check_like("output", output, input.shape)
    loss = _sigmoid_loss(input.detach().to(compute_dtype(input)), target, gamma, alpha)
    output.copy_(loss if factor is None else loss * factor[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss by its logit into `grad_input`; arguments as in the forward."""
    factor = _check(input, target, weight, background=True)
    _check_like("grad_input", grad_input, input.shape)
    p = input.detach().to(compute_dtype(input)).sigmoid()
    # Written out: the derivative of the loss itself ends where a logarithm is kept away from zero, the reference's not.
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * p.clamp(min=SMALLEST).log())
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * (1 - p).clamp(min=SMALLEST).log() - p)
    grad = torch.where(_is_target(input, target), positive, negative)
    grad_input.copy_(grad if factor is None else grad * factor[:, None])


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of each row into `output`.

    Args:
        input: (N, C) probabilities (softmax of the logits).
        target: (N,) int64 classes; a negative one has no loss.
        weight: (C,) factor per class of the target, or empty for none.
        output: (N,), written in place.
        gamma: focusing exponent, which lowers the weight of easy examples.
        alpha: factor of all losses.

    Raises:
        ValueError: a shape does not fit.
        IndexError: a target is C or more.
    """
    factor = _check(input, target, weight, background=False)
    _check_like("output", output, target.shape)
    p = _gather_target(input, target)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=SMALLEST).log()
    loss = torch.where(target >= 0, loss, torch.zeros_like(loss))
    output.copy_(loss if factor is None else loss * factor)


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Write the derivative of each row's loss by its logits into `grad_input` (N, C).

    `buff` (N,) is filled with p * dloss/dp of the target's probability p, as the reference does.
    """
    factor = _check(input, target, weight, background=False)
    _check_like("buff", buff, target.shape)
    _check_like("grad_input", grad_input, input.shape)
    p = _gather_target(input, target)
    slope = gamma * (1 - p) ** (gamma - 1) * p * p.clamp(min=SMALLEST).log() - (1 - p) ** gamma
    slope = alpha * slope
    slope = torch.where(target >= 0, slope, torch.zeros_like(slope))
    if factor is not None:
        slope = slope * factor
    buff.copy_(slope)
    hot = _is_target(input, target)
    grad_input.copy_(slope[:, None] * (hot.to(p.dtype) - input.detach().to(p.dtype)))


def _sigmoid_loss(logits: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    p = logits.sigmoid()
    positive = -alpha * (1 - p) ** gamma * p.clamp(min=SMALLEST).log()
    negative = -(1 - alpha) * p**gamma * (1 - p).clamp(min=SMALLEST).log()
    return torch.where(_is_target(logits, target), positive, negative)


def _is_target(scores: Tensor, target: Tensor) -> Tensor:
    """(N, C) bool."""
    return torch.arange(scores.shape[1], device=scores.device)[None] == target[:, None]


def _gather_target(input: Tensor, target: Tensor) -> Tensor:
    """Gather the (N,) probabilities of the targets; a negative target gets that of class 0."""
    rows = input.detach().to(compute_dtype(input))
    return rows.gather(1, target.clamp(min=0)[:, None])[:, 0] if input.shape[0] else rows.sum(1)


def _check(input: Tensor, target: Tensor, weight: Tensor, background: bool) -> Tensor | None:
    """Check the arguments; return the factor of each row, or None without weights."""
    check_rank("input", input, 2)
    compute_dtype(input)
    check_same_device(input=input, target=target, weight=weight)
    rows, classes = input.shape
    if tuple(target.shape) != (rows,) or target.dtype != torch.int64:
        raise ValueError(f"target must be ({rows},) torch.int64, got {tuple(target.shape)} {target.dtype}")
    if weight.numel() not in (0, classes):
        raise ValueError(f"weight must be empty or ({classes},), got {tuple(weight.shape)}")
    weighted = weight.numel() > 0
    if rows == 0:
        return weight.new_zeros(0) if weighted else None
    low, high = (int(v) for v in torch.stack(torch.aminmax(target)).tolist())
    limit = classes if background and not weighted else classes - 1
    if high > limit or (background and weighted and low < 0):
        raise IndexError(f"target must lie in 0..{limit}, got {low}..{high}")
    if not weighted:
        return None
    return weight.detach().to(compute_dtype(input))[target.clamp(min=0)]


def _check_like(name: str, tensor: Tensor, shape: torch.Size) -> None:
    check_shape(name, tensor, *shape)
    check_floating(**{name: tensor})
