"""Handler for a real TorchServe that refuses its archive."""

from serve.errors import ArchiveError


class Handler:
    def initialize(self, context):
        raise ArchiveError("weights.safetensors has the wrong hash; convert the model again")

    def handle(self, data, context):
        return data
