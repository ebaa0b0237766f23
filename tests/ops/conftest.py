"""mmcv's public Python functions on top of our kernels, whatever extension this environment has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from serve import ops
from serve.ops import extension


@pytest.fixture(scope="module")
def mmcv_ops() -> Iterator[ModuleType]:
    """`mmcv.ops`, with every kernel that we have in the place of mmcv's."""
    ops.install("portable")
    import mmcv.ops

    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in extension.kernels().items():
            patch.setattr(sys.modules["mmcv._ext"], name, kernel)
        yield mmcv.ops
