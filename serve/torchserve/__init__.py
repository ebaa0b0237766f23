"""A real TorchServe as a child process: started, waited for, asked, and ended without a trace.

`process` is the way in; `config` says what TorchServe is told, `launch` how Java is called, `guard` ends it
when we are gone, `log` finds out why a model did not load, `state` lets ``make stop`` find it. None of them
imports torch, and nothing outside this package knows how TorchServe is run.
"""

from serve.torchserve.config import ServedModel, TorchServeOptions
from serve.torchserve.pidfile import stop_running
from serve.torchserve.process import TorchServe, Worker

__all__ = ["ServedModel", "TorchServe", "TorchServeOptions", "Worker", "stop_running"]
