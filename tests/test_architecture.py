"""What `make lint`'s import contracts cannot say: light modules stay light, one reader of the environment."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "serve").rglob("*.py"), *(ROOT / "handlers").rglob("*.py")])
# Imported by the gateway, by ``make stop`` or before the environment is complete: no torch, no mmengine.
LIGHT = (
    "archive",
    "archive.store",
    "cli",
    "cli.predict",
    "client",
    "compare.detections",
    "errors",
    "gateway.app",
    "gateway.batcher",
    "gateway.server",
    "logs",
    "ops",
    "predict",
    "protocol.frames",
    "settings",
    "storage",
    "torchserve",
    "torchserve.supervisor",
    "visualize.detections",
    "zoo",
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=[module_of(path) for path in SOURCES])
def test_only_settings_reads_the_environment(path):
    reads = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv")
        and getattr(node.value, "id", "") == "os"
    ]
    # `environment` hands variables on to other processes and libraries, it does not read settings.
    assert not reads or module_of(path) in (
        "serve.settings.kernels",
        "serve.settings.options",
        "serve.settings.process",
        "serve.settings.environment",
    )


def test_light_modules_do_not_import_torch():
    names = ", ".join(f"serve.{name}" for name in LIGHT)
    code = f"import sys, {names}; print(*({{'torch', 'mmengine', 'numba'}} & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == ""


def test_only_the_backend_of_the_gateway_speaks_to_torchserve():
    speaking = set()
    for path in (ROOT / "serve" / "gateway").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            module = getattr(node, "module", None) or ""
            if {"httpx", "serve.torchserve", "serve.torchserve.management"} & {*names, module}:
                speaking.add(module_of(path))
            if isinstance(node, ast.Constant) and node.value in ("modelName", "customizedMetadata"):
                speaking.add(module_of(path))
    # `siblings` uses httpx between the processes of one gateway.
    assert speaking == {"serve.gateway.backend", "serve.gateway.siblings"}
