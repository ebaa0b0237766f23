"""Real archives of real models, made once per session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from handlers.mmdet3d_handler import MMDet3DHandler
from serve import archive, ops
from serve.convert import Conversion, convert

ops.install()

DEMO = Path(__file__).parents[2] / "serve" / "demo"
DEMO_CONFIG, DEMO_CHECKPOINT = DEMO / "second_demo.py", DEMO / "second_demo.pth"


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def demo_mar(store) -> Path:
    return convert(Conversion(DEMO_CONFIG, DEMO_CHECKPOINT, store, "second")).path


@pytest.fixture(scope="session")
def demo_archive(demo_mar, tmp_path_factory) -> archive.Archive:
    return archive.extract(demo_mar, tmp_path_factory.mktemp("opened"))


@pytest.fixture(scope="session")
def detector(demo_archive):
    import torch

    from serve.runtime import load_detector

    return load_detector(demo_archive, torch.device("cpu"))


@pytest.fixture(scope="session")
def street() -> np.ndarray:
    """A synthetic street of some 17,000 points with cars in it."""
    from serve.demo.scenes import sample_frame

    return np.frombuffer(sample_frame(), dtype=np.float32).reshape(-1, 4)


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


@pytest.fixture(scope="session")
def handler(demo_archive):
    handler = MMDet3DHandler()
    handler.initialize(Context(demo_archive.root))
    return handler


@pytest.fixture
def ask(handler, demo_archive):
    """Call the handler; returns [(status, document)] per row."""

    def call(*rows, headers=()):
        context = Context(demo_archive.root, headers=headers)
        answers = handler.handle(
            [{"body": row} if not isinstance(row, dict) else row for row in rows], context
        )
        assert len(answers) == len(rows) == len(context.status)
        assert set(context.response_headers.values()) == {"application/json"}
        return [(context.status[i][0], orjson.loads(answer)) for i, answer in enumerate(answers)]

    return call
