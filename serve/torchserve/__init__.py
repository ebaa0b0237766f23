"""TorchServe as a child process: start, wait for its models, manage, stop.

`process` is the entry point; `config` writes TorchServe's configuration, `java` its command line, `guard` stops it when
the parent dies, `log` finds the reason of a failed load, `pidfile` lets ``mmdet3d-serve stop`` find it. None of them
imports torch.
"""

from serve.torchserve.config import ServedModel, TorchServeOptions
from serve.torchserve.pidfile import stop_running
from serve.torchserve.process import TorchServe, Worker

__all__ = ["ServedModel", "TorchServe", "TorchServeOptions", "Worker", "stop_running"]
