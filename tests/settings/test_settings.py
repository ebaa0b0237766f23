"""Settings of every process: read once; a wrong one stops the start with a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from serve.errors import SettingsError
from serve.gateway.options import GatewayOptions
from serve.labelling.options import LabelStudioOptions
from serve.settings import CONFIG, RENAMED, Limits, Options, Settings, option, warn_renamed
from serve.settings.kernels import KernelSettings
from serve.storage.references import ReferenceLimits
from serve.torchserve import TorchServeOptions
from tools import settings_page

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def warn_again() -> Iterator[None]:
    warn_renamed.cache_clear()
    yield
    warn_renamed.cache_clear()


def test_defaults_need_no_environment():
    settings = Settings.from_environment({"PATH": "/bin"})
    assert settings == Settings() and settings.limits == Limits()


def test_values_are_read_and_typed():
    settings = Settings.from_environment(
        {
            "MMDET3D_SERVE_OPS": "portable",
            "MMDET3D_SERVE_TRUST_ARCHIVE_CODE": "1",
            "MMDET3D_SERVE_MAX_POINTS": "1000",
            "MMDET3D_SERVE_CACHE_DIR": "/tmp/x",
        }
    )
    assert settings == Settings(
        ops="portable", trust_archive_code=True, max_points=1000, cache_dir=Path("/tmp/x")
    )
    with pytest.raises(FrozenInstanceError):
        settings.max_points = 1


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MMDET3D_SERVE_OPS": "portable"},
        {"MMDET3D_SERVE_OPS": "auto", "MMDET3D_SERVE_CACHE_DIR": "/tmp/x"},
        {"MMDET3D_SERVE_OPS": "fast"},
        {"MMDET3D_SERVE_OPS": ""},
        {"MMDET3D_SERVE_CACHE_DIR": " "},
        {"MMDET3D_SERVE_TRITON": "off"},
        {"MMDET3D_SERVE_TRITON": "never"},
    ],
)
def test_kernels_read_their_settings_without_pydantic_as_all_others_do(variables):
    def read(kind):
        try:
            found = kind.from_environment(variables)
        except SettingsError as error:
            return str(error)
        return found.ops, found.cache_dir, found.triton

    assert read(KernelSettings) == read(Settings)


def test_importing_the_kernels_imports_no_pydantic():
    code = "import serve.ops, serve.settings.kernels, sys; print('pydantic' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_blank_variable_turns_a_switch_off_and_is_an_error_for_anything_else():
    assert not Settings.from_environment({"MMDET3D_SERVE_KEEP_HEAP": ""}).keep_heap
    for name in ("MAX_POINTS", "OPS", "CACHE_DIR"):
        with pytest.raises(SettingsError, match=f"MMDET3D_SERVE_{name} must be .* got ''"):
            Settings.from_environment({f"MMDET3D_SERVE_{name}": ""})


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MMDET3D_SERVE_MAX_POINT", "3", "did you mean MMDET3D_SERVE_MAX_POINTS"),
        ("MMDET3D_SERVE_KEEP_MEMORRY", "3", "did you mean MMDET3D_SERVE_KEEP_HEAP"),
        ("MMDET3D_SERVE_ZZZ", "3", "known: MMDET3D_SERVE_CACHE_DIR, "),
        ("MMDET3D_SERVE_MAX_POINTS", "0", "at least 1"),
        ("MMDET3D_SERVE_MAX_POINTS", "many", "whole number"),
        ("MMDET3D_SERVE_MAX_POINTS", "1.5", "whole number"),
        ("MMDET3D_SERVE_OPS", "fast", "auto or portable"),
        ("MMDET3D_SERVE_TRUST_ARCHIVE_CODE", "perhaps", "true or false"),
    ],
)
def test_wrong_variable_is_named_with_its_value_and_what_it_may_be(variable, value, says):
    with pytest.raises(SettingsError, match=says) as raised:
        Settings.from_environment({variable: value})
    assert variable in str(raised.value)


def test_every_mistake_is_reported_at_once():
    with pytest.raises(SettingsError) as raised:
        Settings.from_environment({"MMDET3D_SERVE_MAX_POINTS": "0", "MMDET3D_SERVE_THREADS": "x"})
    assert "MAX_POINTS must" in str(raised.value) and "THREADS must" in str(raised.value)


def test_wrong_setting_stops_every_command_with_a_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "serve", "zoo", "second"],
        env={**os.environ, "MMDET3D_SERVE_OPS": "fast"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "error: MMDET3D_SERVE_OPS must be auto or portable, got 'fast'"
    )


LINKS = {
    "MMDET3D_SERVE_SERVICE_HOST": "10.0.0.1",
    "MMDET3D_SERVE_SERVICE_PORT": "8000",
    "MMDET3D_SERVE_SERVICE_PORT_HTTP": "8000",
    "MMDET3D_SERVE_PORT": "tcp://10.0.0.1:8000",
    "MMDET3D_SERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "MMDET3D_SERVE_PORT_8000_TCP_PROTO": "tcp",
    "MMDET3D_SERVE_PORT_8000_TCP_PORT": "8000",
    "MMDET3D_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
    "MMDET3D_SERVE_GATEWAY_SERVICE_HOST": "10.0.0.2",
    "MMDET3D_SERVE_GATEWAY_PORT": "tcp://10.0.0.2:8000",
    "MMDET3D_SERVE_GATEWAY_PORT_8000_TCP_ADDR": "10.0.0.2",
}


def test_variables_that_kubernetes_adds_for_a_service_of_that_name_are_no_settings() -> None:
    assert Settings.from_environment(LINKS) == Settings()
    assert GatewayOptions.build({}, LINKS) == GatewayOptions()
    assert GatewayOptions.build({}, {**LINKS, "MMDET3D_SERVE_GATEWAY_PORT": "9000"}).port == 9000


@pytest.mark.parametrize("name", ["SERVICES", "GATEWAY", "PORT_NUMBER", "PORT"])
def test_variable_that_only_looks_like_a_service_link_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="unknown setting"):
        Settings.from_environment({f"MMDET3D_SERVE_{name}": "8000"})


def test_variable_of_a_class_is_no_mistake_to_any_other() -> None:
    for variable in (each.variable for cls in CLASSES for each in cls.options() if each.variable):
        for cls in CLASSES:
            cls._variables({variable: "1"})  # raises if it is unknown


def test_class_with_variables_in_a_scope_of_its_own_is_added_to_the_scopes() -> None:
    with pytest.raises(TypeError, match="SCOPES"):
        type("Other", (Options,), {"SCOPE": "other_"})


# Former names


def test_every_former_name_leads_to_an_option_that_exists() -> None:
    scoped = {f"{cls._scoped(each.name)}" for cls in CLASSES for each in cls.options()}
    assert {new.name for new in RENAMED.values()} <= scoped
    assert not set(RENAMED) & scoped


CLASSES = (Settings, GatewayOptions, LabelStudioOptions, TorchServeOptions)


def test_former_variable_works_with_one_warning_and_the_new_one_goes_first(caplog) -> None:
    former = {"MMDET3D_SERVE_GATEWAY_LINGER_S": "4"}
    for _ in range(2):
        assert GatewayOptions.build({}, former).shutdown_delay_s == 4
    (record,) = caplog.records
    assert "GATEWAY_LINGER_S is now MMDET3D_SERVE_GATEWAY_SHUTDOWN_DELAY_S" in record.getMessage()
    both = {**former, "MMDET3D_SERVE_GATEWAY_SHUTDOWN_DELAY_S": "5"}
    assert GatewayOptions.build({}, both).shutdown_delay_s == 5


def test_wrong_value_of_a_former_variable_is_reported_under_the_name_that_was_used() -> None:
    with pytest.raises(SettingsError, match="MMDET3D_SERVE_GATEWAY_DRAIN_S must be"):
        GatewayOptions.build({}, {"MMDET3D_SERVE_GATEWAY_DRAIN_S": "long"})


# One limit on a frame


def test_one_variable_bounds_frames_in_every_process() -> None:
    for name in ("MMDET3D_SERVE_MAX_FRAME_BYTES", "MMDET3D_SERVE_GATEWAY_MAX_FRAME_BYTES"):
        variables = {name: "1000000"}
        assert Settings.from_environment(variables).limits.max_frame_bytes == 1_000_000
        assert GatewayOptions.build({}, variables).max_frame_bytes == 1_000_000


def test_one_default_bounds_frames_in_every_process() -> None:
    assert (
        Limits().max_frame_bytes
        == Settings().max_frame_bytes
        == GatewayOptions().max_frame_bytes
        == ReferenceLimits().max_bytes
    )


# The mechanism


@dataclass(frozen=True, config=CONFIG)
class Example(Options):
    SCOPE = "gateway_"
    size: int = option(3, "N", "how many", ge=2, lt=9)
    name: Annotated[str, Field(max_length=3)] = option("abc", "", "what")


def test_whatever_pydantic_raises_is_a_settings_error() -> None:
    for wrong in ({"size": object()}, {"size": 9}, {"name": "long"}, {"name": 3}, {"colour": 1}):
        with pytest.raises(SettingsError):
            Example(**wrong)
        with pytest.raises(SettingsError):
            Example.build(wrong, {})


def test_misspelled_argument_gets_the_closest_option() -> None:
    with pytest.raises(SettingsError, match="did you mean size"):
        Example(sise=3)


def test_flag_goes_before_variable_before_default_of_the_command_before_default_of_the_class() -> None:
    variables, defaults = {"MMDET3D_SERVE_GATEWAY_SIZE": "5"}, {"size": 6}
    assert Example.build({"size": "4"}, variables, defaults=defaults).size == 4
    assert Example.build({}, variables, defaults=defaults).size == 5
    assert Example.build({}, {}, defaults=defaults).size == 6
    assert Example.build({}, {}).size == 3


def test_options_survive_the_way_through_json() -> None:
    options = GatewayOptions(worker_sockets=None, api_keys=("a", "b"), lead_time_s=0.1, otlp_endpoint=None)
    assert GatewayOptions.build(options.dump(), {}) == options


def test_private_option_is_read_but_neither_suggested_nor_documented() -> None:
    private = [each for cls in CLASSES for each in cls.options() if each.private]
    assert [each.variable for each in private] == [
        "MMDET3D_SERVE_WORKER_SOCKETS",
        "MMDET3D_SERVE_CONFINE",
        "MMDET3D_SERVE_GATEWAY_WORKER_SOCKETS",
    ]
    assert Settings.from_environment({"MMDET3D_SERVE_WORKER_SOCKETS": "/run/w"}).worker_sockets == Path(
        "/run/w"
    )
    for wrong in ("WORKER_SOCKET", "ZZZ"):
        with pytest.raises(SettingsError) as raised:
            Settings.from_environment({f"MMDET3D_SERVE_{wrong}": "x"})
        assert "WORKER_SOCKETS" not in str(raised.value)
    rows = settings_page.render().partition("## Former names")[0]
    assert "WORKER_SOCKETS" not in rows and "--worker-sockets" not in rows


def test_former_way_to_send_batches_through_torchserve_works_with_a_warning(caplog) -> None:
    options = GatewayOptions.build({}, {"MMDET3D_SERVE_GATEWAY_WORKER_SOCKETS": "none"})
    assert options.socket_folder is None and options.worker_sockets is None
    assert "worker_sockets=none is now direct_batches=false" in caplog.text


def test_documentation_of_settings_is_current() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page.render(), (
        "run `python -m tools.settings_page`"
    )


def test_every_option_has_a_description_and_a_unit_if_it_is_a_number() -> None:
    for cls in CLASSES:
        for each in cls.options():
            assert each.description and (each.unit or each.kind not in (int, float)), each.name


def test_settings_import_neither_torch_nor_numpy_nor_cv2() -> None:
    code = "import sys, serve.settings; print(*({'torch', 'numpy', 'cv2', 'numba'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
