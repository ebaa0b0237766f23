"""Kernels in Triton without a GPU: their tests, interpreted, and their code, compiled for several cards.

Triton is not in the project's environment (its wheel has 200 MB): `make test-triton` makes one that has it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serve.ops import device_kernels
from serve.ops.device_kernels import DeviceKernels
from serve.settings.environment import child_environment

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**child_environment(), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_kernels_give_interpreted_what_the_loops_give():
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA; make test-triton has it")
    ran = run("-m", "pytest", "-q", "-p", "no:xdist", "tests/ops/triton", TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout[-3000:]


def test_serving_on_a_cpu_imports_no_triton():
    code = (
        "import serve.ops, torch; serve.ops.install('portable'); import mmcv.ops, sys;"
        "mmcv.ops.nms(torch.rand(4, 4), torch.rand(4), 0.5); import serve.runtime.detector;"
        "print('triton' in sys.modules)"
    )
    assert run("-c", code).stdout.split()[-1] == "False"


@pytest.mark.parametrize("broken", [True, False])
def test_device_without_a_working_triton_has_the_ways_of_torch_and_says_why(broken, monkeypatch):
    device_kernels.device_kernels.cache_clear()
    if broken:
        monkeypatch.setitem(sys.modules, "triton", None)  # an import fails
    else:
        monkeypatch.setenv("MMDET3D_SERVE_TRITON", "off")
    try:
        found = device_kernels.device_kernels(0)
    finally:
        device_kernels.device_kernels.cache_clear()
    assert isinstance(found, DeviceKernels) and not found.triton
    assert ("import" if broken else "MMDET3D_SERVE_TRITON=off") in found.description
    assert not device_kernels.uses_triton(torch.ones(1))


def test_kernel_compiles_in_a_confined_worker_under_the_guard_of_an_archive(tmp_path):
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA; make test-triton has it")
    code = f"""
from pathlib import Path
import torch
from serve.ops.device_kernels import keep_code_in
from serve.ops.triton.suppression import overlap_bits
from serve.runtime.build_guard import BuildGuard
from serve.worker.confinement import confine_writes
from tools.bench.triton_kernels import compiling_only
folder = Path({str(tmp_path)!r})
keep_code_in(folder, confined=True)
with compiling_only(90) as made:
    print(confine_writes([folder, Path("/dev")]))
    with BuildGuard(None, {{}}):
        overlap_bits(torch.rand(9, 4), 0.0, 0.5)
    print(len(made))
"""
    ran = run("-c", code)
    assert ran.stdout.split()[-1] == "1", ran.stdout + ran.stderr
    assert any((tmp_path / "triton").rglob("*.cubin"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_card_without_spilling_registers(capability):
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA; make test-triton has it")
    ran = run("-m", "tools.bench", "triton", "--capability", str(capability))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(ran.stdout.splitlines()[-1])["rows"]
    assert len({row["kernel"] for row in rows}) >= 7
    for row in rows:
        assert row["spilled_bytes"] <= 8 and row["shared_bytes"] <= 96 << 10, row
