"""What TorchServe is started with: its configuration files, its archives and its environment."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.torchserve import ServedModel, TorchServeOptions
from serve.torchserve.config import Manifest, log_configuration, properties, read_manifest
from serve.torchserve.java import child_environment
from tests.conftest import write_archive

HANDLER = "tests.torchserve.echo_handler"


def test_properties_close_management_and_metrics(tmp_path: Path) -> None:
    options = TorchServeOptions(tmp_path, [ServedModel("a.mar", workers=2)], gpus=1)
    told = dict(line.split("=", 1) for line in properties(options, [Manifest("a", "1.0", "h")]).splitlines())
    assert told["inference_address"] == "http://127.0.0.1:8080"
    assert told["management_address"] == "http://127.0.0.1:8081"
    assert told["disable_token_authorization"] == "true"
    opened = properties(TorchServeOptions(tmp_path, open_management=True), [])
    assert "disable_token_authorization=false" in opened.splitlines()
    assert told["metrics_address"] == "http://127.0.0.1:8082"
    assert told["metrics_mode"] == "prometheus"
    assert told["allowed_urls"] == "(?!)"
    assert told["decode_input_request"] == told["install_py_dep_per_model"] == "false"
    assert told["max_request_size"] == str(64 << 20)
    assert told["number_of_gpu"] == "1"
    assert told["system_metrics_cmd"].endswith("--gpu 0")  # Else it wants nvgpu and collects nothing at all.
    assert told["load_models"] == "a=a.mar"
    assert json.loads(told["models"])["a"]["1.0"]["minWorkers"] == 2
    assert json.loads(told["models"])["a"]["1.0"]["batchSize"] == 1


def test_path_round_trips_through_java_properties(tmp_path: Path) -> None:
    store = tmp_path / "模型 store\\x"
    store.mkdir()
    text = properties(TorchServeOptions(store), [])
    assert text.isascii()
    line = next(line for line in text.splitlines() if line.startswith("model_store="))
    assert line.endswith(r"\u6a21\u578b store\\x")


def test_log_configuration_is_well_formed_for_any_folder(tmp_path: Path) -> None:
    import xml.etree.ElementTree as tree

    text = log_configuration(
        TorchServeOptions(tmp_path, log_level="warn"), tmp_path / 'a&"<b' / "torchserve.log"
    )
    root = tree.fromstring(text.encode())
    assert root.find("Appenders/RollingFile").get("fileName") == str(tmp_path / 'a&"<b' / "torchserve.log")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"inference_port": 0}, "inference_port must be .* at least 1"),
        ({"metrics_port": 8080}, "must differ"),
        ({"management_host": "0.0.0.0"}, "open_management"),
        ({"inference_host": "localhost"}, "must be an IP address"),
        ({"max_request_bytes": 1 << 31}, "max_request_bytes"),
        ({"response_timeout_s": 0}, "response_timeout_s must be .* at least 1"),
    ],
)
def test_impossible_settings_are_rejected(tmp_path: Path, setting: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        TorchServeOptions(tmp_path, **setting)


@pytest.mark.parametrize("text", ["../x.mar", "a=b,c.mar", "a/b=c.mar", "", "=x.mar"])
def test_archive_names_outside_the_store_are_rejected(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^--models must be"):
        ServedModel.parse(text)


def test_duplicate_model_version_is_rejected(tmp_path: Path) -> None:
    options = TorchServeOptions(tmp_path, [ServedModel("a.mar"), ServedModel("b.mar")])
    with pytest.raises(SettingsError, match="twice"):
        properties(options, [Manifest("a", "1.0", "h"), Manifest("a", "1.0", "h")])


def test_read_manifest_returns_model_version_and_handler(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.mar", HANDLER, name="second", version="2.1")
    assert read_manifest(path) == Manifest("second", "2.1", HANDLER)


def test_child_environment_has_the_package_and_no_torchserve_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TS_CONFIG_FILE", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/before")
    environment = child_environment()
    assert "TS_CONFIG_FILE" not in environment
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "/before"
    assert (Path(environment["PYTHONPATH"].split(os.pathsep)[0]) / "serve" / "__init__.py").is_file()
