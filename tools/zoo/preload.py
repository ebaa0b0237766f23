"""Imports shared by all probes: the fork server of a sweep loads this module and forks the probes.

Importing it takes seconds and installs the configured kernels. Nothing is computed here, because a forked process must
not inherit threads.
"""

from __future__ import annotations

import warnings

import torch

from serve import ops
from serve.settings import Settings

settings = Settings.from_environment()
ops.install(settings.ops, cache_dir=settings.cache_dir)
torch.set_num_threads(settings.threads or 1)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mmdet3d.apis  # noqa: F401

from serve.convert import random_weights  # noqa: E402, F401
