"""The wheel of the client alone, in an environment that has httpx and numpy and nothing else."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.gateway.conftest import backend, background, cloud, gateway, start_gateway, torchserve
from tools.client_wheel import build

__all__ = ["backend", "background", "cloud", "gateway", "start_gateway", "torchserve"]  # fixtures

# What httpx and numpy consist of.
NEEDED = ("httpx", "httpcore", "h11", "anyio", "idna", "certifi", "typing_extensions", "numpy")
MOST_BYTES = 100_000
PROGRAM = """
import sys
import numpy as np
import serve.client
from serve.client import AsyncClient, Client
from serve.errors import UndecodableFrame
assert "site-packages" in serve.client.__file__, serve.client.__file__
for name in ("torch", "cv2", "orjson", "pydantic", "fastapi", "serve.gateway"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")
with Client(sys.argv[1]) as client:
    points = np.frombuffer(open(sys.argv[2], "rb").read(), np.float32).reshape(-1, 4)
    result = client.predict(points, "second", score_thr=0.25)
    print(result.boxes.shape[1], result.box_type, client.describe("second")["modality"])
"""


@pytest.mark.slow
def test_installed_wheel_needs_no_torch_and_calls_a_gateway(gateway, cloud, tmp_path: Path) -> None:
    wheel = build(tmp_path / "wheel")
    print(f"{wheel.name}: {wheel.stat().st_size} bytes")
    assert wheel.stat().st_size < MOST_BYTES
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as file:  # what pip does with a wheel of pure Python
        names = file.namelist()
        file.extractall(packages)
    assert "serve/py.typed" in names and any(name.endswith("METADATA") for name in names)
    for name in NEEDED:
        found = importlib.metadata.files(name) or ()
        for top in {entry.parts[0] for entry in found} - {"..", "__pycache__"}:
            root = Path(str(found[0].locate())).parents[len(found[0].parts) - 1]
            if not (packages / top).exists():
                (packages / top).symlink_to(root / top)
    frame = tmp_path / "frame.bin"
    frame.write_bytes(cloud(1))
    python = tmp_path / "bare" / "bin" / "python"
    ran = subprocess.run(
        [python, "-I", "-c", PROGRAM, gateway.url, frame], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["7", "LiDAR", "lidar"]


def test_metadata_of_the_wheel_is_that_of_the_project() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    own = tomllib.loads((root / "client" / "pyproject.toml").read_text())["project"]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert (own["requires-python"], own["license"]) == (project["requires-python"], project["license"])
    assert set(project["dependencies"]) <= set(own["dependencies"])
    httpx = next(each for each in own["dependencies"] if each.startswith("httpx"))
    assert httpx in project["optional-dependencies"]["storage"]


def test_client_imports_nothing_heavy_where_everything_is_installed() -> None:
    code = "import sys, serve.client; print(*sorted({'cv2', 'orjson', 'pydantic', 'torch', 'PIL'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == ""
