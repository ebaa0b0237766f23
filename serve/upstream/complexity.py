"""``get_flops``: parameters and multiply-adds of a frame, per part of the network.

Upstream's program feeds a bare tensor where the networks take voxels, and stops (mmdetection3d#3005, #981). This one
runs a frame as the server does, through the test pipeline, and counts what is computed: dense operations by torch's own
formulas, sparse convolutions by their pairs of input and output voxels. As upstream, one multiplication with its
addition counts as one operation.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from serve.errors import SettingsError

__all__ = ["Counts", "count_operations", "main", "takes"]

_DEPTH = 2
# Kernels of mmcv whose work is not counted, by the class of the module that calls them.
_UNCOUNTED_PACKAGE = "mmcv.ops"


def takes(package: str, arguments: Sequence[str]) -> bool:
    """Whether this replaces the program of `package`: mmdet's own lacks ``--shape`` and reads the data set."""
    return package == "mmdet3d" or any(word.startswith(("--shape", "--frame")) for word in arguments)


class Counts(TorchDispatchMode):
    """Counter of multiply-adds, by the path of the module that computes them.

    Attributes:
        by_part: path of a module → multiply-adds in it and all its parts; ``""`` for the whole.
        uncounted: class names of mmcv's modules whose kernels are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_part: dict[str, int] = defaultdict(int)
        self.uncounted: set[str] = set()
        self._open: list[str] = [""]
        self._in_sparse = 0

    def add(self, count: int) -> None:
        """Add to every module that is being computed."""
        for path in self._open:
            self.by_part[path] += count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not self._in_sparse:
            self.add(formula(*args, **(kwargs or {}), out_val=out) // 2)
        return out

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Count by module within the block."""
        with ExitStack() as hooks:
            for path, module in network.named_modules():
                before = module.register_forward_pre_hook(self._enter(path, module))
                after = module.register_forward_hook(self._leave(path, module), always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            with self:
                yield

    def _enter(self, path: str, module: nn.Module) -> Any:
        sparse = _is_sparse(module)

        def enter(module: nn.Module, inputs: Any) -> None:
            if path:
                self._open.append(path)
            self._in_sparse += sparse

        return enter

    def _leave(self, path: str, module: nn.Module) -> Any:
        sparse = _is_sparse(module)
        named = type(module).__name__
        is_kernel = type(module).__module__.startswith(_UNCOUNTED_PACKAGE) and not any(module.children())

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if sparse:
                self.add(_sparse_operations(module, inputs[0], output))
            elif is_kernel:
                self.uncounted.add(named)
            self._in_sparse -= sparse
            if path:
                self._open.remove(path)

        return leave


def _is_sparse(module: nn.Module) -> bool:
    return type(module).__module__ == "mmcv.ops.sparse_conv"


def _sparse_operations(module: Any, given: Any, output: Any) -> int:
    """Multiply-adds of a sparse convolution: one product of channels for every pair of voxels."""
    channels = module.in_channels * module.out_channels
    if module.conv1x1:
        return int(output.features.shape[0] * channels)
    found = given.indice_dict.get(module.indice_key)
    pairs: Tensor = found[3]
    return int(pairs.sum().item() * channels)


def count_operations(
    config: Path, shape: Sequence[int] = (), frame: Path | None = None
) -> tuple[nn.Module, Counts, int, tuple[int, ...]]:
    """Run one frame through a network with initial weights, and count.

    Args:
        config: of mmdet or mmdet3d.
        shape: points (and columns) of the frame; height and width of the picture that the network gets, for models
            without points; empty for the sample scene as it is.
        frame: the user's frame in place of the sample scene; for a frame of several parts a folder.

    Returns:
        The network, the counts, its parameters, and the shape of the points (N, columns) or of the picture.
    """
    from serve.convert import configured_classes, resolve_config
    from serve.convert.golden import golden_frame, read_frame
    from serve.protocol.frames import decode_frame
    from serve.protocol.options import FrameOptions
    from serve.runtime.model import build_network
    from serve.runtime.pipeline import InputPipeline
    from serve.settings import Limits

    resolved = resolve_config(config)
    pipeline = InputPipeline(resolved.config)
    parts = read_frame(frame, pipeline.spec) if frame else golden_frame(pipeline.spec)
    if shape and frame is None and pipeline.spec.has_points:
        (part,) = (part for part in parts if not part.startswith(("image", "calibration")))
        name, body = parts[part]
        parts[part] = (name, _resample(body, pipeline.spec.load_dim, shape[0]).tobytes())
    bodies: Any = {part: body for part, (_, body) in parts.items()}
    decoded = decode_frame(
        next(iter(bodies.values())) if len(bodies) == 1 else bodies, pipeline.spec, FrameOptions(), Limits()
    )
    network = build_network(resolved.config, configured_classes(resolved.config))
    sample = pipeline.build(decoded)
    if shape and not pipeline.spec.has_points:
        _resize_picture(sample, shape)
    counts = Counts()
    from mmengine.dataset import pseudo_collate

    step: Any = network.test_step
    with torch.no_grad(), counts.watching(network):
        step(pseudo_collate([sample]))
    inputs = sample["inputs"]
    shown = decoded.points
    if shown is None:
        shown = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    parameters = sum(weight.numel() for weight in network.parameters())
    return network, counts, parameters, tuple(np.shape(shown))


def _resize_picture(sample: dict[str, Any], shape: Sequence[int]) -> None:
    """Give the network a picture of `shape`, past the resizing of the test pipeline."""
    size = (shape[0], shape[-1])
    inputs = sample["inputs"]
    name = next(iter(inputs)) if isinstance(inputs, dict) else None
    picture = inputs[name] if name else inputs
    resized = nn.functional.interpolate(picture[None].float(), size=size).to(picture.dtype)[0]
    if name:
        inputs[name] = resized
    else:
        sample["inputs"] = resized
    sample["data_samples"].set_metainfo({"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})


def _resample(body: bytes, columns: int, points: int) -> npt.NDArray[np.float32]:
    """Take `points` points of a scene; more than it has are drawn near those it has, the same on every call."""
    cloud = np.frombuffer(body, np.float32).reshape(-1, columns)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(cloud)) if points <= len(cloud) else rng.integers(0, len(cloud), points)
    chosen = cloud[rows[:points]].copy()
    chosen[len(cloud) :, :3] += rng.normal(0, 0.1, (max(points - len(cloud), 0), 3)).astype(np.float32)
    return chosen


def main(arguments: Sequence[str], program: str) -> int:
    """Parse the arguments, count, and print upstream's table and the parts."""
    parser = argparse.ArgumentParser(
        program, description="Parameters and multiply-adds of a network for one frame, per part."
    )
    parser.add_argument("config", help="name of the zoo, path or URI")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        help="points and columns of a frame, such as 40000 4, or height and width of a picture (default: the sample "
        "scene as it is)",
    )
    parser.add_argument(
        "--modality", choices=("point", "image", "multi"), help="not needed: the config says it"
    )
    parser.add_argument("--frame", type=Path, help="your frame in place of the sample scene")
    args = parser.parse_args(list(arguments))
    if args.shape and (len(args.shape) > 2 or args.shape[0] < 1):
        raise SettingsError(f"--shape takes points and columns, or height and width, got {args.shape}")
    network, counts, parameters, shape = count_operations(Path(args.config), args.shape or (), args.frame)
    line = "=" * 30
    total = _operations(counts.by_part[""])
    print(f"{line}\nInput shape: {shape}\nFlops: {total}\nParams: {parameters / 1e6:.3f} M\n{line}")
    for path, module in network.named_modules():
        if path and path.count(".") < _DEPTH and counts.by_part.get(path):
            own = sum(weight.numel() for weight in module.parameters()) / 1e6
            print(f"{path:<40} {own:10.3f} M  {_operations(counts.by_part[path]):>12}")
    if counts.uncounted:
        print(f"Not counted: the kernels of {', '.join(sorted(counts.uncounted))}.")
    print(
        "Operations of sparse convolutions and of proposals depend on the frame: pass yours with --frame. One "
        "multiplication with its addition is one operation.",
        file=sys.stderr,
    )
    return 0


def _operations(count: int) -> str:
    return f"{count / 1e9:.3f} GFLOPs"
