"""Fake of the context that TorchServe passes to a handler."""

from __future__ import annotations


class Context:
    """What TorchServe 0.12 hands a handler, as far as ours look at it."""

    def __init__(self, model_dir, gpu_id=None, headers=()) -> None:
        self.system_properties = {"model_dir": str(model_dir), "gpu_id": gpu_id}
        self.headers = list(headers)
        self.status: dict[int, tuple[int, str]] = {}
        self.response_headers: dict[tuple[int, str], str] = {}

    def get_all_request_header(self, index):
        return self.headers[index] if index < len(self.headers) else {}

    def get_request_header(self, index, name):
        """TorchServe's look-up of one header, whatever its case."""
        found = {key.lower(): value for key, value in self.get_all_request_header(index).items()}
        return found.get(name.lower())

    def get_request_id(self, index):
        return f"id-{index}"

    def set_response_status(self, code, phrase, index):
        phrase.encode("ascii")
        self.status[index] = (code, phrase)

    def set_response_header(self, index, name, value):
        self.response_headers[index, name] = value
