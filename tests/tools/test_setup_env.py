"""The environment holds what the lock says and nothing that harms, and setting it up is safe to repeat."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serve.torchserve.java import child_environment
from tools import setup_env
from tools.environment import packages, torch_build, venv
from tools.environment.venv import SetupFailed

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = [REQUIREMENTS / "runtime.lock", REQUIREMENTS / "dev.lock"]


def locked(path: Path) -> list[Requirement]:
    lines = [line for line in path.read_text().splitlines() if line[:1].isalnum()]
    return [Requirement(line.removesuffix("\\").strip()) for line in lines]


def installed() -> dict[str, str]:
    """As a fresh process sees it: setuptools, once imported, puts packages of its own on the path."""
    program = (
        "from importlib import metadata\n"
        "for one in metadata.distributions(): print(one.metadata['Name'], one.version)"
    )
    lines = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return {canonicalize_name(name): version for name, version in map(str.split, lines.splitlines())}


# The lock


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_is_pinned_and_hashed(path: Path) -> None:
    for block in re.split(r"\n(?=[a-z0-9])", path.read_text()):
        assert re.match(r"[a-z0-9.-]+==\S+", block), block[:80]
        assert "--hash=sha256:" in block, block[:80]


@pytest.mark.parametrize(
    "name", ["torch", "opencv-python", "open3d", "nuscenes-devkit", "lyft-dataset-sdk", "spconv"]
)
def test_what_must_stay_out_is_not_locked(name: str) -> None:
    assert name not in {requirement.name for path in LOCKS for requirement in locked(path)}


def test_the_two_locks_agree() -> None:
    runtime = {(one.name, str(one.marker)): str(one.specifier) for one in locked(LOCKS[0])}
    for one in locked(LOCKS[1]):
        assert runtime.get((one.name, str(one.marker)), str(one.specifier)) == str(one.specifier)


def test_no_file_names_a_package_index() -> None:
    for path in [*(ROOT / "requirements").iterdir(), ROOT / "Makefile", ROOT / "pyproject.toml"]:
        assert not re.search(r"https?://", path.read_text()), path.name


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def asked_by(*names: str) -> list[str]:
    """Requirements of the project with these extras, those of the extras that they name included."""
    project = pyproject()["project"]
    found: list[str] = list(project["dependencies"])
    for name in names:
        for line in project["optional-dependencies"][name]:
            one = Requirement(line)
            found += asked_by(*one.extras) if one.name == project["name"] else [line]
    return found


def test_every_lock_holds_what_pyproject_asks_for() -> None:
    groups = pyproject()["dependency-groups"]
    asked = {
        "runtime": asked_by("models") + groups["torch-needs"],
        "gateway": asked_by("gateway"),
        "dev": groups["lint"] + groups["test"] + groups["docs"],
        "otel": pyproject()["project"]["optional-dependencies"]["otel"],
        **{name: groups[name] for name in ("bench", "image", "sbom", "installer", "torch-cuda", "train")},
    }
    for name, lines in asked.items():
        pinned = {
            one.name: str(one.specifier).removeprefix("==") for one in locked(REQUIREMENTS / f"{name}.lock")
        }
        for wanted in (Requirement(line) for line in lines if isinstance(line, str)):
            if wanted.name != "torch" or name == "torch-cuda":
                assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), (name, str(wanted))


@pytest.mark.parametrize("name", ["otel", "train"])
def test_the_group_is_the_extra_of_its_name(name: str) -> None:
    assert pyproject()["dependency-groups"][name] == pyproject()["project"]["optional-dependencies"][name]


def test_what_training_adds_leaves_the_packages_of_serving_as_they_are() -> None:
    runtime = {(one.name, str(one.marker)): str(one.specifier) for one in locked(LOCKS[0])}
    train = locked(REQUIREMENTS / "train.lock")
    assert [
        one
        for one in train
        if runtime.get((one.name, str(one.marker)), str(one.specifier)) != str(one.specifier)
    ] == []
    assert {"opencv-python", "open3d", "torch"} & {one.name for one in train} == set()


@pytest.mark.parametrize("extra", ["models", "ops"])
def test_the_range_of_torch_is_the_one_that_pyproject_declares(extra: str) -> None:
    assert torch_build.torch_range_text() in asked_by(extra)


def test_the_wheel_alone_asks_for_numpy_alone() -> None:
    assert [Requirement(line).name for line in asked_by()] == ["numpy"]


# Extras whose packages the environment of the tests may lack: imports are looked up by the names in `brought` then.
OPTIONAL = ("models", "otel", "video", "grpc", "recordings", "rerun", "cvat", "parquet", "ray")


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    declared = {Requirement(line).name for line in asked_by(*OPTIONAL)}
    brought = {
        "botocore": "boto3",
        "cvat_sdk": "cvat-sdk",
        "google": "protobuf",
        "grpc": "grpcio",
        "llvmlite": "numba",
        "matplotlib": "mmengine",
        "mypy_boto3_s3": "types only",
        "mcap_protobuf": "mcap-protobuf-support",
        "pydantic": "fastapi",
        "rcl_interfaces": "ROS 2",
        "rclpy": "ROS 2, by itself",
        "rerun": "rerun-sdk",
        "s3transfer": "boto3",
        "sensor_msgs": "ROS 2",
        "starlette": "fastapi",
        "triton": "torch, where it has CUDA",
        "vision_msgs": "ROS 2",
    }
    distributions = metadata.packages_distributions()
    missing = set()
    for path in [*(ROOT / "serve").rglob("*.py"), *(ROOT / "handlers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - set(brought):
                owners = {canonicalize_name(one) for one in distributions.get(name, [name])}
                if name not in ("serve", "handlers") and not owners & declared:
                    missing.add(f"{name} in {path.relative_to(ROOT)}")
    assert missing == set()


# The environment


def test_the_environment_is_what_the_lock_says() -> None:
    have = installed()
    wanted = {
        canonicalize_name(one.name): one
        for path in LOCKS
        for one in locked(path)
        if one.marker is None or one.marker.evaluate()
    }
    wrong = [
        f"{one}: {have.get(name)}"
        for name, one in wanted.items()
        if not one.specifier.contains(have.get(name, "0"))
    ]
    assert wrong == []


def test_opencv_is_there_once_and_headless() -> None:
    assert [name for name in installed() if name.startswith("opencv")] == ["opencv-python-headless"]


def test_importing_the_server_side_needs_no_torch() -> None:
    program = "import serve.torchserve, serve.cli.serve, sys; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=child_environment(), check=True
    )
    assert ran.stdout == "False\n"


def test_every_task_of_the_makefile_is_described() -> None:
    text = (ROOT / "Makefile").read_text()
    tasks = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    deprecated = set(re.findall(r"^([a-z0-9-]+):.*#- ", text, re.MULTILINE))
    assert set(re.findall(r"^([a-z0-9-]+):.*#[#:] ", text, re.MULTILINE)) | deprecated == tasks
    told = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT)], capture_output=True, text=True, check=True
    )
    listed = set(re.findall(r"^  make ([a-z-]+)", told.stdout, re.MULTILINE))
    others = set(told.stdout.partition("described in the Makefile:")[2].partition("Settings:")[0].split())
    assert listed | others == tasks - deprecated and not listed & others


def test_former_make_tasks_name_the_command_to_use(tmp_path: Path) -> None:
    # Any program in place of Python: it prints its arguments. `-o` keeps make from setting up an environment.
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "ran $*"\n')
    python.chmod(0o755)
    words = [
        "make",
        "-C",
        str(ROOT),
        f"VENV={tmp_path}",
        "-o",
        f"{tmp_path}/.setup-stamp",
        "bench-ops",
        "ARGS=--help",
    ]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "ran -m tools.bench ops --help" in ran.stdout
    assert f"use: {python} -m tools.bench ops --help" in ran.stderr


# tools/setup_env.py


@pytest.mark.parametrize(
    ("version", "kept"),
    [
        ("2.5.1+cu124", False),
        ("2.6.0", True),
        ("2.13.0+cpu", True),
        ("2.13.1a0+gitabc", True),
        ("2.14.1+cu130", True),
        ("2.15.0", False),
        ("3.0.0", False),
    ],
)
def test_a_torch_is_kept_in_the_supported_range(version: str, kept: bool) -> None:
    assert torch_build.torch_in_range(version) is kept


def test_the_torch_of_this_environment_is_in_the_supported_range() -> None:
    assert torch_build.torch_in_range(metadata.version("torch"))


def test_bytecode_is_kept_where_the_environment_would_have_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else every worker compiles all of torch and mmdet3d at its start."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    code = "import orjson, httpx; print('imported')"
    assert setup_env.self_check(Path(sys.prefix), code) == "imported"
    assert [path.parent.name for path in tmp_path.rglob("_client.*.pyc")] == ["httpx"]


def test_an_old_python_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    with pytest.raises(SetupFailed, match=r"Python 3\.11 or newer is needed, this is 3\.10\.4 .*PYTHON="):
        venv.check_python()


def test_a_folder_that_is_no_environment_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SetupFailed, match="is not a virtual environment"):
        setup_env.make_venv(tmp_path, reuse_torch=False)
    assert (tmp_path / "thesis.tex").exists()


def test_the_words_of_pip_are_shown_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="Could not open requirements file"):
        packages.pip(Path(sys.prefix), "-r", str(tmp_path / "absent.txt"))


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("global.index-url='https://a.test/simple'", {"UV_DEFAULT_INDEX": "https://a.test/simple"}),
        (
            "global.extra-index-url='\\nhttps://a.test\\nfile:///b'\nglobal.find-links='/c /d'",
            {"UV_INDEX": "https://a.test file:///b", "UV_FIND_LINKS": "/c,/d"},
        ),
        (
            ":env:.index-url='https://env.test'\nglobal.index-url='https://a.test'\ninstall.index-url='https://b.test'",
            {"UV_DEFAULT_INDEX": "https://env.test"},
        ),
        (
            "global.cert='/ca.crt'\nglobal.trusted-host='a.test b.test'\nglobal.timeout='180'",
            {"SSL_CERT_FILE": "/ca.crt", "UV_INSECURE_HOST": "a.test b.test", "UV_HTTP_TIMEOUT": "180"},
        ),
        ("download.index-url='https://a.test'\nglobal.constraint='/c.txt'", {}),
    ],
)
def test_uv_gets_the_index_that_pip_is_configured_with(
    monkeypatch: pytest.MonkeyPatch, printed: str, expected: dict[str, str]
) -> None:
    for variable in packages.UV_VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    found = packages.uv_environment(printed)
    assert {name: found[name] for name in packages.UV_VARIABLES.values() if name in found} == expected


def test_pip_installs_the_lock_if_uv_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def pip(venv: Path, *arguments: str) -> None:
        asked.append(arguments)
        if "--target" in arguments:
            raise SetupFailed("no uv for this machine")

    monkeypatch.setattr(packages, "pip", pip)
    lock = tmp_path / "a.lock"
    lock.write_text("a==1")
    assert packages.install_lock(tmp_path, [lock]).startswith("1 packages by pip")
    assert "--require-hashes" in asked[1] and asked[1][-2:] == ("-r", str(lock))
    assert "pip cannot fetch it" in capsys.readouterr().out


def test_packages_of_an_interrupted_run_are_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def interrupted_once(venv: Path, arguments: list[str]) -> str:
        asked.append(arguments)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(packages, "_install_by_uv", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        packages.install_lock(tmp_path, [])
    packages.install_lock(tmp_path, [])
    packages.install_lock(tmp_path, [])
    assert ["--reinstall" in arguments for arguments in asked] == [False, True, False]


def test_what_runs_beside_a_step_ends_with_its_children_when_the_step_fails() -> None:
    program = "import subprocess, sys; subprocess.run(['sleep', '600'])"
    with (
        pytest.raises(SetupFailed),
        setup_env.run_alongside([sys.executable, "-c", program]) as process,
    ):
        parent = psutil.Process(process.pid)
        while not (children := parent.children()):
            assert parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE
        raise SetupFailed("no index")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert process.returncode is not None and alive == []


def test_the_fingerprint_changes_with_the_lock_and_the_torch_index(tmp_path: Path) -> None:
    plain, other = (
        argparse.Namespace(torch_version="2.13.0", torch_index_url=None, torch_lock=None),
        argparse.Namespace(torch_version="2.13.0", torch_index_url="x", torch_lock=None),
    )
    lock = tmp_path / "runtime.lock"
    lock.write_text("a==1")
    first = setup_env.fingerprint(plain, [lock])
    assert setup_env.fingerprint(plain, [lock]) == first
    assert setup_env.fingerprint(other, [lock]) != first
    lock.write_text("a==2")
    assert setup_env.fingerprint(plain, [lock]) != first


STEPS = ["install_lock", "install_torch", "install_project", "self_check", "finish_kernels"]


def test_a_second_run_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    for step in STEPS:
        monkeypatch.setattr(setup_env, step, lambda *_, step=step: done.append(step))
    monkeypatch.setattr(setup_env, "make_venv", lambda venv, _: fake_venv(venv))
    monkeypatch.setattr(setup_env, "unpack_torch", lambda *_: None)
    monkeypatch.setattr(setup_env, "kernels_command", lambda _: ["true"])
    arguments = ["--venv", str(tmp_path / "venv")]
    assert setup_env.main(arguments) == 0
    assert done == STEPS
    assert "done in" in capsys.readouterr().out
    assert setup_env.main(arguments) == 0
    assert len(done) == len(STEPS)
    assert setup_env.main([*arguments, "--no-dev"]) == 0
    assert len(done) == 2 * len(STEPS)
    done.clear()
    assert setup_env.main([*arguments, "--project-only", "--no-kernels", "--force"]) == 0
    assert done == ["install_project", "self_check"]


def fake_venv(venv: Path) -> None:
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin" / "python").touch()


def test_a_failed_step_leaves_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise SetupFailed("no index")

    monkeypatch.setattr(setup_env, "make_venv", lambda venv, _: fake_venv(venv))
    monkeypatch.setattr(setup_env, "unpack_torch", lambda *_: None)
    monkeypatch.setattr(setup_env, "install_lock", fail)
    assert setup_env.main(["--venv", str(tmp_path / "venv")]) == 2
    assert capsys.readouterr().err == "error: no index\n"
    assert not (tmp_path / "venv" / setup_env.STAMP_NAME).exists()
