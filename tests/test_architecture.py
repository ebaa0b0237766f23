"""Imports go downward only, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "serve").rglob("*.py"), *(ROOT / "handlers").rglob("*.py")])

# What a part may import of ours, at module level or within functions. Parts not named may import anything below them.
MAY_IMPORT = {
    "serve.errors": set(),
    "serve.ops": {"serve.ops"},
    "serve.archive.config_json": {"serve.errors"},
    "serve.protocol.batch": {"serve.errors"},
    "serve.protocol.calibration": {"serve.errors"},
    "serve.compare.labels": set(),
    "serve.protocol.images": {"serve.errors", "serve.protocol.batch"},
    "serve.protocol.frames": {"serve.protocol.calibration", "serve.errors", "serve.protocol.batch", "serve.protocol.images"},
    "serve.settings": {"serve.errors", "serve.ops", "serve.protocol.frames"},
    "serve.ops.autoload": {"serve.ops", "serve.settings"},
    "serve.archive.format": {"serve", "serve.archive.config_json", "serve.errors"},
    "serve.storage.download": {"serve.errors"},
    "serve.storage": {"serve.storage", "serve.storage.download", "serve.errors", "serve.settings"},
    "serve.archive.store": {"serve", "serve.archive.format", "serve.storage.download", "serve.errors", "serve.storage"},
    "serve.zoo.config_source": {"serve", "serve.errors", "serve.storage"},
    "serve.client": {"serve.errors"},
    "serve.torchserve": {"serve", "serve.torchserve", "serve.errors", "serve.archive.format", "serve.settings"},
    "serve.gateway.admission": {"serve.errors"},
    "serve.gateway.latency": set(),
    "serve.gateway.batcher": {"serve.errors", "serve.gateway.latency"},
    "serve.gateway.backend": {"serve.client", "serve.gateway.http_pool", "serve.gateway.worker_client", "serve.errors", "serve.protocol.batch"},
    "serve.gateway.http_pool": {"serve.protocol.batch"},
    "serve.gateway.worker_client": {"serve.gateway.http_pool", "serve.protocol.batch"},
    "serve.logs": set(),
    "serve.gateway": {
        "serve", "serve.gateway", "serve.gateway.admission", "serve.gateway.backend", "serve.gateway.batcher", "serve.visualize.detections", "serve.errors",
        "serve.protocol.batch", "serve.settings", "serve.storage", "serve.protocol.frames",
    },
    "serve.compare.detections": {"serve.compare.assignment", "serve.errors", "serve.compare.labels"},
    "serve.runtime": {
        "serve", "serve.runtime", "serve.archive.format", "serve.protocol.calibration", "serve.compare.detections", "serve.errors",
        "serve.protocol.batch", "serve.compare.labels", "serve.ops", "serve.protocol.images", "serve.storage", "serve.protocol.frames",
    },
}  # fmt: skip
LIGHT = (
    "archive",
    "backend",
    "batching",
    "drawing",
    "gateway.app",
    "gateway.server",
    "logs",
    "framing",
    "wire",
    "zoo",
    "client",
    "download",
    "model_store",
    "storage",
    "torchserve",
    "comparison",
    "settings",
    "errors",
    "ops",
    "cli",
)


def part_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "serve" else set()
            )
            files = {name for name in inside if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            packages = {name for name in inside if (ROOT / name.replace(".", "/")).is_dir()}
            found |= (files | packages) or {node.module}
    return {part_of(name) for name in found if name.split(".")[0] in ("serve", "handlers")}


@pytest.mark.parametrize("path", SOURCES, ids=[module_of(path) for path in SOURCES])
def test_imports_go_downward_only(path):
    part = part_of(module_of(path))
    found = imports_of(path)
    if part in MAY_IMPORT:
        assert found <= MAY_IMPORT[part]
    if not module_of(path).startswith(("handlers", "serve.__main__")):
        assert not {name for name in found if name.startswith("handlers")}
    if part not in ("serve.cli", "serve.__main__"):
        assert "serve.cli" not in found


@pytest.mark.parametrize("path", SOURCES, ids=[module_of(path) for path in SOURCES])
def test_every_module_says_what_it_does_and_only_settings_reads_the_environment(path):
    tree = ast.parse(path.read_text())
    assert path.read_text().strip() == "" or ast.get_docstring(tree)
    reads = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv")
        and getattr(node.value, "id", "") == "os"
    ]
    # The environment is handed on to other processes there, not read.
    assert not reads or module_of(path) in (
        "serve.settings",
        "serve.torchserve.java",
        "tools.bench.reference.process",
    )


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_do_not_import_torch(name):
    code = f"import serve.{name}, sys; assert 'torch' not in sys.modules and 'mmengine' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_only_the_backend_of_the_gateway_speaks_to_torchserve():
    speaking = set()
    for path in (
        *(ROOT / "serve/gateway").rglob("*.py"),
        ROOT / "serve/gateway/batcher.py",
        ROOT / "serve/gateway/backend.py",
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            module = getattr(node, "module", None) or ""
            if {"httpx", "serve.gateway.http_pool", "serve.torchserve"} & {*names, module}:
                speaking.add(module_of(path))
            if isinstance(node, ast.Constant) and node.value in ("modelName", "customizedMetadata"):
                speaking.add(module_of(path))
    assert speaking == {"serve.gateway.backend"}
