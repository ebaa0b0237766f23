"""What upstream's own Python gets wrong around its kernels on a machine without CUDA or with a current torch.

* `furthest_point_sample`, `knn` and `points_in_boxes` ask torch.cuda for its current device, or for tensors, whatever
  the input is on: without CUDA they raise before any kernel is called.
* `sparse_structure.scatter_nd` indexes with a list, which torch deprecates and will read as a tensor; and
  `SparseConvTensor` multiplies its extents with numpy, which fails where they are a tensor, as in mmdet3d's MinkUNet.
* `masked_conv` calls ``torch.addmm`` by an order of arguments that torch deprecates.
* `multi_scale_deform_attn` never calls its kernel on a CPU but a slow way of its own.
* `nms`, and mmdet3d's loading of labels, evaluate a text of a config as Python: the name of a function, or of a type
  of numpy's. A config may come from an archive, which is data; here such a text is looked up.

Each is mended when its module is imported (`serve.ops.install`). Knows these modules of mmcv 2.1.0 and mmdet3d
1.4.0 only.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

__all__ = ["PATCHES", "PatchingLoader"]


class PatchingLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, then mends it."""

    def __init__(self, loader: Any, mend: Callable[[ModuleType], None]) -> None:
        """Take the module's own `loader`."""
        self._loader = loader
        self._mend = mend

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Leave it to the module's own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then mend it."""
        self._loader.exec_module(module)
        self._mend(module)


class _TorchOverlay:
    """`torch` as one module should see it: some of it replaced."""

    def __init__(self, torch: Any, **replaced: Any) -> None:
        self._torch = torch
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def _assume_no_cuda(module: ModuleType) -> None:
    torch = module.__dict__["torch"]
    if not torch.cuda.is_available():
        cuda = SimpleNamespace(
            # What Tensor.get_device() says of a CPU tensor.
            current_device=lambda: -1,
            set_device=lambda device: None,
            IntTensor=torch.IntTensor,
            FloatTensor=torch.FloatTensor,
        )
        module.__dict__["torch"] = _TorchOverlay(torch, cuda=cuda)


def _patch_addmm(module: ModuleType) -> None:
    torch = module.__dict__["torch"]

    def addmm(beta: float, added: Any, alpha: float, first: Any, second: Any) -> Any:
        """``beta * added + alpha * first @ second``, called as torch once was."""
        return torch.addmm(added, first, second, beta=beta, alpha=alpha)

    module.__dict__["torch"] = _TorchOverlay(torch, addmm=addmm)


def _patch_sparse_structure(module: ModuleType) -> None:
    def scatter_nd(indices: Any, updates: Any, shape: Any) -> Any:
        """A tensor of `shape` with `updates` (N, …) at `indices` (N, len(leading shape)), zero elsewhere."""
        out = updates.new_zeros(tuple(shape))
        out[tuple(indices.reshape(-1, indices.shape[-1]).t())] = updates
        return out

    module.__dict__["scatter_nd"] = scatter_nd
    made = module.SparseConvTensor.__init__

    def initialize(
        self: Any, features: Any, indices: Any, spatial_shape: Any, *more: Any, **named: Any
    ) -> None:
        """Make one; its extents may be a tensor."""
        shape = spatial_shape.tolist() if hasattr(spatial_shape, "tolist") else spatial_shape
        made(self, features, indices, shape, *more, **named)

    module.SparseConvTensor.__init__ = initialize


def _use_attention_kernel(module: ModuleType) -> None:
    from serve.ops.deform.attention import attend

    module.__dict__["multi_scale_deformable_attn_pytorch"] = attend


def _look_up_functions(module: ModuleType) -> None:
    def find_function(name: str) -> Any:
        """The module's own function of that name."""
        found = vars(module).get(name)
        if not isinstance(found, FunctionType) or found.__module__ != module.__name__:
            raise ValueError(f"{name!r} is no function of {module.__name__}; a config names one, as 'nms'")
        return found

    module.__dict__["eval"] = find_function


def _look_up_types(module: ModuleType) -> None:
    numpy = module.__dict__["np"]

    def find_type(name: str) -> Any:
        """The scalar type of numpy's of that name, as ``np.int64``."""
        found = getattr(numpy, name.removeprefix("np."), None)
        if not (isinstance(found, type) and issubclass(found, numpy.generic)):
            raise ValueError(f"{name!r} is no type of numpy's; a config names one, as 'np.int64'")
        return found

    module.__dict__["eval"] = find_type


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "mmcv.ops.furthest_point_sample": _assume_no_cuda,
    "mmcv.ops.knn": _assume_no_cuda,
    "mmcv.ops.masked_conv": _patch_addmm,
    "mmcv.ops.nms": _look_up_functions,
    "mmcv.ops.points_in_boxes": _assume_no_cuda,
    "mmcv.ops.sparse_structure": _patch_sparse_structure,
    "mmcv.ops.multi_scale_deform_attn": _use_attention_kernel,
    "mmdet3d.datasets.transforms.loading": _look_up_types,
}
