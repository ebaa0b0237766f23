"""mmcv's public Python functions on top of given kernel modules."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from serve import ops


def mmcv_ops(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Any:
    """`mmcv.ops` calling the kernels of `modules`."""
    ops.install("portable")
    import mmcv.ops

    for module in modules:
        for name in module.__all__:
            monkeypatch.setattr(sys.modules["mmcv._ext"], name, getattr(module, name))
    return mmcv.ops
