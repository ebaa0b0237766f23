"""CUDA graphs for the parts of a network whose shapes do not depend on the frame: backbone, neck, head.

Their launches are recorded for each shape of the input, hence for each size of batch, and replayed as one. A recording
has input and output buffers of its own; all recordings of a function share the memory between. Those of two functions
do not: a replay may overwrite the outputs of what was recorded after it, and these may still be read. The first calls
with a shape run as before, because libraries choose their algorithms in them. A recording is used only if it gives,
replayed, what the call gave; whatever cannot be recorded (it waits, or memory is short) runs as before, and a warning
says so once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["GraphCache", "Recording", "graphs_of", "record_forward", "record_launches", "release_graphs"]

logger = logging.getLogger(__name__)

# Calls with a shape before it is recorded; images of many shapes are never recorded.
CALLS_BEFORE = 3
MAX_RECORDINGS = 8
# Shapes whose calls are counted.
MAX_COUNTED = 64


@dataclass
class Recording:
    """Launches of one function for one kind of input.

    Attributes:
        inputs: buffers from which they read.
        outputs: buffers to which they write, overwritten by the next replay.
        replay: launches them again.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    replay: Callable[[], None]


class GraphCache:
    """Recordings of the functions of one network, the least recently used of which go when there are too many."""

    def __init__(self) -> None:
        """Start with none."""
        self.replays = 0
        self.disabled: str | None = None
        self._recordings: OrderedDict[Any, tuple[Recording, Any]] = OrderedDict()
        self._calls: OrderedDict[Any, int] = OrderedDict()
        self._pools: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._recordings)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of nested tensors that records `function` and replays it.

        The result is valid until the next call, of any shapes. Calls with anything but tensors and None, or with
        gradients, run as they are.
        """

        def call(*arguments: Any) -> Any:
            leaves, structure = tree_flatten(arguments)
            if self.disabled is not None or torch.is_grad_enabled() or not all(map(_is_tensor, leaves)):
                return function(*arguments)
            key = (id(function), str(structure), *map(_kind, leaves), _precision())
            known = self._recordings.get(key)
            if known is None:
                return self._count_and_run(key, function, arguments)
            self._recordings.move_to_end(key)
            recording, spec = known
            for buffer, leaf in zip(recording.inputs, leaves, strict=True):
                if buffer is not leaf:
                    buffer.copy_(leaf)
            recording.replay()
            self.replays += 1
            return tree_unflatten(recording.outputs, spec)

        return call

    def release(self) -> None:
        """Free the memory of all recordings; they are made anew when they are called for."""
        self._recordings.clear()
        self._calls.clear()
        self._pools.clear()

    def _count_and_run(self, key: Any, function: Callable[..., Any], arguments: Any) -> Any:
        result = function(*arguments)
        self._calls[key] = self._calls.pop(key, 0) + 1
        if len(self._calls) > MAX_COUNTED:
            self._calls.popitem(last=False)
        if self._calls[key] < CALLS_BEFORE:
            return result
        leaves, structure = tree_flatten(arguments)
        outputs, spec = tree_flatten(result)
        if not all(map(_is_tensor, outputs)):
            return result
        try:
            recording = self._record(function, leaves, structure)
            if recording is None or not _agree(recording.outputs, outputs):
                self._disable("what was recorded gives another result")
            else:
                while len(self._recordings) >= MAX_RECORDINGS:
                    # Its shape is counted anew: shapes that take turns are not recorded at every call.
                    self._calls.pop(self._recordings.popitem(last=False)[0], None)
                self._recordings[key] = recording, spec
        except torch.cuda.OutOfMemoryError:
            self.release()
            self._disable("the memory of the device is short")
        except RuntimeError as error:
            self._disable(str(error)[:200])
        return result

    def _record(self, function: Callable[..., Any], leaves: list[Tensor], structure: Any) -> Recording | None:
        inputs = [leaf.clone(memory_format=torch.preserve_format) for leaf in leaves]

        def run() -> list[Tensor]:
            found: list[Tensor] = tree_flatten(function(*tree_unflatten(inputs, structure)))[0]
            return found

        if id(function) not in self._pools and torch.cuda.is_available():
            self._pools[id(function)] = torch.cuda.graph_pool_handle()
        outputs, replay = record_launches(run, inputs[0].device, self._pools.get(id(function)))
        replay()
        return Recording(inputs, outputs, replay)

    def _disable(self, reason: str) -> None:
        self.disabled = reason
        logger.warning("CUDA graphs are not used: %s", reason)


def record_launches(
    run: Callable[[], list[Tensor]], device: torch.device, pool: Any
) -> tuple[list[Tensor], Callable[[], None]]:
    """Record what `run` launches on a CUDA device; return its results and a function that launches it again.

    Raises:
        RuntimeError: `run` waits for the device, or does something else that a graph cannot hold.
    """
    cached = torch.is_autocast_cache_enabled()
    # A weight in half precision that autocast keeps would lie in the graph's memory and be used outside of it.
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                run()  # this stream's own workspaces
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads, which decode and answer, may use CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = run()
    finally:
        torch.set_autocast_cache_enabled(cached)
    return outputs, graph.replay


def graphs_of(network: nn.Module) -> GraphCache:
    """Return the recordings of a network, made at the first call."""
    cache = vars(network).get("_cuda_graphs")
    if cache is None:
        cache = network.__dict__["_cuda_graphs"] = GraphCache()
    return cache


def record_forward(part: Any, graphs: GraphCache | None) -> None:
    """Have a module's ``forward`` recorded and replayed, if `graphs` are wanted."""
    if graphs is not None:
        part.forward = graphs.wrap(part.forward)


def release_graphs(network: nn.Module) -> None:
    """Free the memory of a network's recordings, if it has any."""
    if "_cuda_graphs" in vars(network):
        graphs_of(network).release()


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _precision() -> tuple[Any, ...]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _agree(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether a replay gave what the call gave; an algorithm chosen anew may round otherwise."""
    return all(
        torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3, equal_nan=True)
        for one, other in zip(outputs, expected, strict=True)
    )
