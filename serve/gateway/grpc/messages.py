"""Message classes of the protocols, from the compiled ``.proto`` files of this package (``make proto``).

They are in a descriptor pool of their own: Triton's client registers messages of the same names in protobuf's default
pool, and one process may hold both.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

__all__ = ["HEALTH", "INFERENCE", "POOL", "message_class"]

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"


def _load(*names: str) -> DescriptorPool:
    pool = DescriptorPool()
    for name in names:
        compiled = FileDescriptorSet.FromString(files(__package__).joinpath(f"{name}.binpb").read_bytes())
        for file in compiled.file:
            pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load("open_inference", "health")


def message_class(name: str) -> Any:
    """Return the class of a message by its full name, such as ``inference.ModelInferRequest``."""
    return GetMessageClass(POOL.FindMessageTypeByName(name))
