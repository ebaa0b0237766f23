"""Names of devices; the construction of networks is tested with the detectors and the models of the zoos."""

from __future__ import annotations

import pytest
import torch

from serve.errors import SettingsError
from serve.runtime.model import parse_device


def test_cpu_is_always_there() -> None:
    assert parse_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:-1", "cuda:x", "cuda:99999999999", "cpu:1", "mps", "meta"])
def test_name_of_no_such_kind_of_device_is_rejected(name: str) -> None:
    with pytest.raises(SettingsError, match="cpu or cuda:N"):
        parse_device(name)


@pytest.mark.parametrize(
    ("gpus", "name", "usable"),
    [(0, "cuda", "no GPU"), (0, "cuda:0", "no GPU"), (2, "cuda:2", "only cuda:0, cuda:1")],
)
def test_gpu_that_is_not_there_is_rejected_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, usable: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(SettingsError, match=f"{name} .*{usable}$"):
        parse_device(name)


def test_gpu_that_is_there_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1") == torch.device("cuda", 1)
