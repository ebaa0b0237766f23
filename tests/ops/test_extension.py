"""The extension module: complete, lazy, and with clear errors for unsupported kernels."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve import ops
from serve.ops import extension


def test_extension_has_every_function_that_mmcv_loads():
    location = importlib.util.find_spec("mmcv").submodule_search_locations[0]
    asked: set[str] = set()
    for source in (Path(location) / "ops").glob("*.py"):
        for names in re.findall(r"load_ext\(\s*'_ext',\s*\[(.*?)\]", source.read_text(), re.DOTALL):
            asked |= set(re.findall(r"'(\w+)'", names))
    assert asked == extension.MMCV_KERNELS
    assert set(extension.kernels()) <= extension.MMCV_KERNELS
    module = extension.build("mmcv._ext")
    assert all(callable(getattr(module, name)) for name in asked)


def test_every_kernel_is_on_the_page_of_differences():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    assert set(extension.kernels()) <= set(re.findall(r"`(\w+)`", page))


def test_unsupported_kernel_error_names_kernel_and_alternative():
    module = extension.build("mmcv._ext")
    with pytest.raises(extension.UnsupportedKernelError, match=r"upfirdn2d.*compiled mmcv"):
        module.upfirdn2d(1, 2)


def test_install_is_idempotent_and_imports_nothing_heavy():
    code = (
        "import sys; import serve.ops; serve.ops.install(); serve.ops.install();"
        "assert not {'torch', 'numba', 'mmcv'} & set(sys.modules), 'heavy';"
        "assert sum(type(f).__name__ == '_ExtensionFinder' for f in sys.meta_path) == 1;"
        "assert serve.ops.kernels_in_use() == 'none'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mmcv_ops_uses_portable_kernels():
    ops.install()
    import mmcv.ops

    assert mmcv.ops.nms is not None
    assert ops.kernels_in_use() == "portable"


@pytest.mark.parametrize(("preference", "expected"), [("auto", "compiled"), ("portable", "portable")])
def test_compiled_extension_is_preferred_by_default(tmp_path, preference, expected):
    # A package named mmcv with its own extension represents a compiled mmcv.
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("")
    (tmp_path / "mmcv" / "_ext.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import serve.ops as o; o.install({preference!r});"
        "o.install();"  # as other modules do: it must keep the choice
        f"import mmcv._ext; assert o.kernels_in_use() == {expected!r}, o.kernels_in_use()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
