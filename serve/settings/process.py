"""Settings of every process: variables ``MMDET3D_SERVE_*``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass

from pydantic.dataclasses import dataclass

from serve.settings.kernels import DEFAULT_CACHE_DIR, Preference, Switch
from serve.settings.options import CONFIG, FilePath, Flag, OptionalPath, Options, option

__all__ = ["MAX_FRAME_BYTES", "Limits", "Preference", "Settings"]

MAX_FRAME_BYTES = 32 << 20


@plain_dataclass(frozen=True)
class Limits:
    """Upper bounds on one frame (bytes, points, pixels), checked before memory is taken."""

    max_frame_bytes: int = MAX_FRAME_BYTES
    max_points: int = 2_000_000
    max_pixels: int = 50_000_000


@dataclass(frozen=True, config=CONFIG)
class Settings(Options):
    """Settings of every process: variables ``MMDET3D_SERVE_*``."""

    ops: Preference = option(
        "auto", "", "kernels: a compiled mmcv if one is installed (auto), or always our own (portable)"
    )
    triton: Switch = option(
        "auto", "", "on a CUDA device, kernels in Triton where Triton works (auto), or torch's own ways (off)"
    )
    cuda_graphs: Switch = option(
        "off",
        "",
        "on a CUDA device, record the launches of backbone, neck and head per size of batch and replay them (auto)",
    )
    trust_archive_code: Flag = option(False, "", "import modules packed in an archive; they can run anything")
    max_frame_bytes: int = option(
        MAX_FRAME_BYTES, "BYTES", "largest frame, in gateway and workers", common=True, ge=1
    )
    max_points: int = option(Limits.max_points, "POINTS", "largest point cloud", ge=1)
    max_pixels: int = option(Limits.max_pixels, "PIXELS", "largest image", ge=1)
    threads: int = option(
        0,
        "N",
        "torch threads of one worker; 0 takes all cores, or as many as a container's CPU quota pays for",
        ge=0,
    )
    cache_dir: FilePath = option(DEFAULT_CACHE_DIR, "DIR", "folder for downloads and compiled kernels")
    open_management: Flag = option(
        False,
        "",
        "give TorchServe's management a port, with tokens, and let it lie beyond loopback, as in a container then",
    )
    open_torchserve: Flag = option(
        False,
        "",
        "a container: TorchServe's own predictions and metrics listen beyond loopback, without the gateway's limits; "
        "not if the gateway has API keys, unless --inference-host and --metrics-host say so. The image sets it",
    )
    workers: int = option(1, "N", "Python processes per model", common=True, ge=1)
    cache_max_bytes: int = option(
        20_000_000_000,
        "BYTES",
        "bound on cached copies of remote objects; files with a hash in their name are not counted",
        ge=0,
    )
    keep_heap: Flag = option(
        True,
        "",
        "on a CPU, keep freed memory for the next frame; off if MALLOC_*, GLIBC_TUNABLES or another allocator is set",
    )
    skip_background: Flag = option(
        True,
        "",
        "on a CPU, compute only the cells of a bird's-eye-view map that points reach; answers have the same bits",
    )
    watch: Flag = option(
        True,
        "",
        "count detections, scores, classes, sizes and points in the workers, for the gateway's metrics",
    )
    worker_sockets: OptionalPath = option(
        None,
        "DIR",
        "folder in which a worker listens for batches; set by the process that starts TorchServe",
        private=True,
    )

    confine: Flag = option(
        False,
        "",
        "let a worker write only its machine code and its record of the start, by Landlock; set by the process that "
        "starts TorchServe, unless code of archives is trusted",
        private=True,
    )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read all ``MMDET3D_SERVE_*`` variables except those of the gateway.

        Raises:
            SettingsError: unknown name or impossible value.
        """
        return cls.build({}, environ, defaults={"keep_heap": not _malloc_is_tuned(environ)})

    @property
    def limits(self) -> Limits:
        """The bounds on one frame."""
        return Limits(self.max_frame_bytes, self.max_points, self.max_pixels)


def _malloc_is_tuned(environ: Mapping[str, str]) -> bool:
    """Whether the environment chooses an allocator, or settings for glibc's."""
    preloaded = environ.get("LD_PRELOAD", "")
    return (
        any(name.startswith("MALLOC_") for name in environ)
        or "glibc.malloc" in environ.get("GLIBC_TUNABLES", "")
        or any(name in preloaded for name in ("jemalloc", "tcmalloc", "mimalloc"))
    )
