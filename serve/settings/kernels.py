"""Settings of the kernels, read with the standard library alone.

The kernels work in environments that have mmcv and torch and none of this project's dependencies, hence no pydantic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from serve.errors import SettingsError
from serve.settings.names import PREFIX

__all__ = ["DEFAULT_CACHE_DIR", "KernelSettings", "Preference", "Switch"]

Preference = Literal["auto", "portable"]
Switch = Literal["auto", "off"]
DEFAULT_CACHE_DIR = Path("~/.cache/mmdet3d-serve")


class KernelSettings(NamedTuple):
    """The fields of `serve.settings.Settings` that the kernels need.

    Attributes:
        ops: which kernels to use.
        cache_dir: folder for compiled kernels if the package's own folder is not writable.
        triton: whether kernels in Triton are used on CUDA devices where they work.
    """

    ops: Preference = "auto"
    cache_dir: Path = DEFAULT_CACHE_DIR
    triton: Switch = "auto"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> KernelSettings:
        """Read ``MMDET3D_SERVE_OPS``, ``MMDET3D_SERVE_CACHE_DIR`` and ``MMDET3D_SERVE_TRITON``.

        Raises:
            SettingsError: impossible value; the same message as from `serve.settings.Settings`.
        """
        choices: dict[str, Preference] = {"auto": "auto", "portable": "portable"}
        ops = environ.get(f"{PREFIX}OPS", "auto")
        if ops not in choices:
            raise SettingsError(f"{PREFIX}OPS must be auto or portable, got {ops!r}")
        triton = environ.get(f"{PREFIX}TRITON", "auto")
        if triton not in ("auto", "off"):
            raise SettingsError(f"{PREFIX}TRITON must be auto or off, got {triton!r}")
        folder = environ.get(f"{PREFIX}CACHE_DIR")
        if folder is not None and not folder.strip():
            raise SettingsError(f"{PREFIX}CACHE_DIR must be a path, or unset, got {folder!r}")
        return cls(
            choices[ops],
            DEFAULT_CACHE_DIR if folder is None else Path(folder),
            "off" if triton == "off" else "auto",
        )
