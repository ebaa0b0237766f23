"""Patches of mmcv's and mmdet3d's own Python for machines without CUDA, current torch, and untrusted configs.

* `furthest_point_sample`, `knn` and `points_in_boxes` call torch.cuda for inputs on any device: without CUDA they raise
  before they call a kernel.
* `sparse_structure.scatter_nd` indexes with a list, which torch deprecates and will read as a tensor; and
  `SparseConvTensor` multiplies its extents with numpy, which fails if they are a tensor, as in mmdet3d's MinkUNet.
* `masked_conv` calls ``torch.addmm`` with a deprecated order of arguments.
* `multi_scale_deform_attn` never calls its kernel on a CPU, but a slow torch function.
* `nms`, and mmdet3d's loading of labels, `eval` a string of the config: the name of a function, or of a numpy type. A
  config may come from an archive, which is untrusted data; the patches look the name up instead.

`serve.ops.install` applies a patch when its module is imported. The patches are for mmcv 2.1.0 and mmdet3d 1.4.0.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

__all__ = ["PATCHES", "ModuleOverlay", "PatchingLoader"]


class PatchingLoader(importlib.abc.Loader):
    """Loader that runs a module's own loader and then patches the module."""

    def __init__(self, loader: Any, patch: Callable[[ModuleType], None]) -> None:
        """Wrap the module's own `loader`."""
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module with its own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then patch it."""
        self._loader.exec_module(module)
        self._patch(module)


class ModuleOverlay:
    """Proxy of a module for one other module, with some attributes replaced."""

    def __init__(self, torch: Any, **replaced: Any) -> None:
        self._torch = torch
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def _assume_no_cuda(module: ModuleType) -> None:
    torch = module.__dict__["torch"]
    if not torch.cuda.is_available():
        cuda = SimpleNamespace(
            # Tensor.get_device() of a CPU tensor.
            current_device=lambda: -1,
            set_device=lambda device: None,
            IntTensor=torch.IntTensor,
            FloatTensor=torch.FloatTensor,
        )
        module.__dict__["torch"] = ModuleOverlay(torch, cuda=cuda)


def _patch_addmm(module: ModuleType) -> None:
    torch = module.__dict__["torch"]

    def addmm(beta: float, added: Any, alpha: float, first: Any, second: Any) -> Any:
        """Compute ``beta * added + alpha * first @ second`` with torch's former order of arguments."""
        return torch.addmm(added, first, second, beta=beta, alpha=alpha)

    module.__dict__["torch"] = ModuleOverlay(torch, addmm=addmm)


def _patch_sparse_structure(module: ModuleType) -> None:
    def scatter_nd(indices: Any, updates: Any, shape: Any) -> Any:
        """Scatter `updates` (N, …) at `indices` (N, len(leading shape)) into zeros of `shape`."""
        out = updates.new_zeros(tuple(shape))
        out[tuple(indices.reshape(-1, indices.shape[-1]).t())] = updates
        return out

    module.__dict__["scatter_nd"] = scatter_nd
    original = module.SparseConvTensor.__init__

    def initialize(
        self: Any, features: Any, indices: Any, spatial_shape: Any, *more: Any, **named: Any
    ) -> None:
        """Initialize; `spatial_shape` may be a tensor."""
        shape = spatial_shape.tolist() if hasattr(spatial_shape, "tolist") else spatial_shape
        original(self, features, indices, shape, *more, **named)

    module.SparseConvTensor.__init__ = initialize


def _use_attention_kernel(module: ModuleType) -> None:
    if not hasattr(module.__dict__["ext_module"], "PORTABLE"):
        return  # a compiled mmcv is left as it is
    from serve.ops.deform.attention import attend

    module.__dict__["multi_scale_deformable_attn_pytorch"] = attend


def _look_up_functions(module: ModuleType) -> None:
    def find_function(name: str) -> Any:
        """Find the module's own function of that name."""
        # Dumps of lazy configs name a function by its path.
        package, _, own = name.rpartition(".")
        found = vars(module).get(own) if package in ("", "mmcv.ops", module.__name__) else None
        if not isinstance(found, FunctionType) or found.__module__ != module.__name__:
            raise ValueError(f"{name!r} is not a function of {module.__name__}; use a name such as 'nms'")
        return found

    module.__dict__["eval"] = find_function


def _look_up_packages(module: ModuleType) -> None:
    """Have mmengine find installed packages by `importlib.metadata`.

    It asks pkg_resources, which setuptools no longer contains, for every ``_base_ = 'mmdet::…'`` (mmcv#3325).
    """
    import importlib.metadata
    import importlib.util
    from pathlib import Path

    def is_installed(package: str) -> bool:
        """Whether a distribution or an importable module of that name is there."""
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            spec = importlib.util.find_spec(package)
            return spec is not None and spec.origin is not None
        return True

    def package2module(package: str) -> str:
        """Top-level module of a distribution."""
        names = importlib.metadata.distribution(package).read_text("top_level.txt") or ""
        if not names.strip():
            raise ValueError(f"can not infer the module name of {package}")
        return names.split()[0]

    def get_installed_path(package: str) -> str:
        """Folder of an installed package, by the name of its distribution or of its module."""
        name = package
        if importlib.util.find_spec(package) is None:
            name = package2module(package)
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise importlib.metadata.PackageNotFoundError(package)
        if spec.origin is None:
            raise RuntimeError(f"{package} is a namespace package, which is invalid for `get_install_path`")
        return str(Path(spec.origin).parent)

    for function in (is_installed, package2module, get_installed_path):
        module.__dict__[function.__name__] = function


def _look_up_types(module: ModuleType) -> None:
    numpy = module.__dict__["np"]

    def find_type(name: str) -> Any:
        """Find the numpy scalar type of that name, such as ``np.int64``."""
        found = getattr(numpy, name.removeprefix("np."), None)
        if not (isinstance(found, type) and issubclass(found, numpy.generic)):
            raise ValueError(f"{name!r} is not a numpy scalar type; use a name such as 'np.int64'")
        return found

    module.__dict__["eval"] = find_type


def _let_none_be_replaced(module: ModuleType) -> None:
    """Let a config replace a base's ``None`` by a dictionary, as storage pages do with ``backend_args``."""
    merge = module.Config._merge_a_into_b

    def merge_over_none(a: dict[str, Any], b: Any, allow_list_keys: bool = False) -> Any:
        """Merge `a` into `b`, a dictionary or a list; None in `b` counts as absent where `a` has a dictionary."""
        if not isinstance(b, dict):
            return merge(a, b, allow_list_keys)
        replaced = [key for key in b if dict.__getitem__(b, key) is None and isinstance(a.get(key), dict)]
        if replaced:
            b = b.copy()  # of its own type: a ConfigDict has its members as attributes
            for key in replaced:
                del b[key]
        return merge(a, b, allow_list_keys)

    module.Config._merge_a_into_b = staticmethod(merge_over_none)


def _know_standard_library(module: ModuleType) -> None:
    """Have mmengine take every module of the standard library for one.

    It compares folders, which fails in a virtual environment and for frozen modules such as `os`: a config with
    ``import os`` is then read as a "lazy" one, and its ``_base_`` is refused.
    """
    look = module.__dict__["_is_builtin_module"]

    def is_builtin(name: str) -> bool:
        """Whether a module is the standard library's or mmengine's own for configs."""
        return name.partition(".")[0] in sys.stdlib_module_names or bool(look(name))

    module.__dict__["_is_builtin_module"] = is_builtin


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "mmcv.ops.furthest_point_sample": _assume_no_cuda,
    "mmcv.ops.knn": _assume_no_cuda,
    "mmcv.ops.masked_conv": _patch_addmm,
    "mmcv.ops.nms": _look_up_functions,
    "mmcv.ops.points_in_boxes": _assume_no_cuda,
    "mmcv.ops.sparse_structure": _patch_sparse_structure,
    "mmcv.ops.multi_scale_deform_attn": _use_attention_kernel,
    "mmdet3d.datasets.transforms.loading": _look_up_types,
    "mmengine.config.config": _let_none_be_replaced,
    "mmengine.config.utils": _know_standard_library,
    "mmengine.utils.package_utils": _look_up_packages,
}
