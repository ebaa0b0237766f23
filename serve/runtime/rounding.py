"""Variants of a network, whose weights are changed by as little as rounding changes what they compute.

Their answers show which values rounding decides (`serve.compare.ties`): how far they move is the condition of the
model on that frame, in the sense of numerical analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from serve.compare.ties import VARIANTS
from serve.runtime.background import background_skipped, set_skipping
from serve.runtime.background_model import MASKED
from serve.runtime.fused_conv import FusedConv, FusedLinear

__all__ = ["changed_weights", "variants"]

# float32 rounds to 2**-24. Seen as a change of all weights, other summation orders amount to 2**-28 to 2**-24, folded
# batch norms to 2**-27 to 2**-22 (docs/decisions/0014-equality.md).
_SPREADS = (2.0**-22, 2.0**-20)


@contextmanager
def changed_weights(network: nn.Module, variant: int) -> Iterator[None]:
    """Multiply every weight of a network by 1 + noise of some roundings within the block.

    Args:
        network: changed in place, and restored exactly.
        variant: 0 changes nothing; another number selects noise, reproducibly.
    """
    if not variant:
        yield
        return
    generator = torch.Generator().manual_seed(variant)
    spread = _SPREADS[variant % len(_SPREADS)]
    weights = list(_weights(network))
    former = [weight.detach().clone() for weight in weights]
    skipped = background_skipped(network)
    set_skipping(network, enabled=False)  # what is skipped was computed with the weights as they are
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1 + spread * torch.randn(weight.shape, generator=generator).to(weight))
        _drop_packed(network)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, former, strict=True):
                weight.copy_(value)
        _drop_packed(network)
        set_skipping(network, enabled=skipped)


def variants(network: nn.Module, run: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what `run`, which calls the network, returns for each of its variants."""
    for variant in range(1, VARIANTS + 1):
        with changed_weights(network, variant):
            answer = run()
        yield answer


def _weights(network: nn.Module) -> Iterator[Tensor]:
    """Parameters, and the packed weights of fused layers, which are no parameters."""
    yield from (weight for weight in network.parameters() if weight.is_floating_point())
    for module in network.modules():
        if isinstance(module, FusedConv | FusedLinear):
            packed = [module.layer]
        else:
            packed = list(module.layers) if isinstance(module, MASKED) else []
        for layer in packed:
            yield torch.from_numpy(layer.weight)
            yield torch.from_numpy(layer.bias)


def _drop_packed(network: nn.Module) -> None:
    """Let sparse convolutions pack their weights anew."""
    from serve.runtime.fused_sparse_conv import FusedSparseConv

    for module in network.modules():
        if isinstance(module, FusedSparseConv):
            module.drop_packed()
