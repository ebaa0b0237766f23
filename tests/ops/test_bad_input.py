"""No corrupted argument of any kernel crashes the process or gives a wrong result silently.

`fuzz_kernels` calls the kernels in a process of its own. Invalid reads show as results that depend on the contents of
free memory, and, with bounds checks in compiled loops (some kernels in `make test`, all in `make test-soak`), even if
they are harmless.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.ops import extension
from tests.conftest import kept_folder
from tools.bench.kernels.inputs import Inputs

from .fuzz_kernels import CASES, names

ROOT = Path(__file__).resolve().parents[2]
NO_TENSORS = {"get_compiler_version", "get_compiling_cuda_version"}

# Changes that give another valid call with another result: kernel, argument, change (patterns).
VALID = [
    # The argument alone determines a number of items, or the size of a map.
    ("nms_match", "dets", "along 0"),
    ("get_indice_pairs_.*", "indices", "along 0"),
    ("hard_voxelize_forward", "points", "along 0"),
    ("dynamic_point_to_voxel_forward", "feats", "along 1"),
    ("dynamic_point_to_voxel_forward", "coors", "along 1"),
    ("indice_conv_forward", "filters", "along 4"),
    # A rulebook may be shorter than the filters (Cylinder3D's layers share one by its key).
    ("(fused_)?indice_conv_(forward|backward)", "filters", "longer along [012]"),
    ("indice_maxpool_forward", "features", "along 1"),
    ("indice_(conv|maxpool)_backward", "out_bp|features", "longer along 0"),
    ("ms_deform_attn_forward", "value", "along 3"),
    ("sync_bn_forward_(mean|var)", "input", "along [02]"),
    ("contour_expand", "kernel_mask", "along 0"),
    ("pixel_group", "embedding", "along 2"),
    ("tin_shift_.*", "shift", "along 1"),
    (".*(align|pool).*", "input|features", "(shorter|longer) along [23]"),
    ("masked_im2col_forward", "im", "longer along [23]"),
    ("knn_forward", "(new_)?xyz_tensor", "longer along 2"),
    # Empty means none.
    ("deform_roi_pool_forward", "offset", "nothing along"),
    ("sync_bn_forward_output", "running_mean", "nothing along"),
    # Out of range has a meaning: no neighbour, background, dropped, shifted out of the image, any point in space.
    ("assign_score_withk_.*", "knn_idx", "an index"),
    ("s.*_focal_loss_.*", "target", "an index of -7"),
    ("dynamic_point_to_voxel_.*", "coors|coors_idx", "an index"),
    ("tin_shift_.*", "shift", "an index"),
]  # fmt: skip
# Arithmetic continues with these; only two equal calls and no invalid reads are required.
NOT_FINITE = {"one NaN", "all NaN", "infinite", "enormous"}


Outcomes = dict[str, list[dict[str, str]]]
# Kernels with bounds checks in `make test`: of boxes, of points, of a grid, and of images.
CHECKED_ALWAYS = ("nms", "points_in_boxes_part_forward", "hard_voxelize_forward", "roi_align_forward")


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """Fuzz all kernels with the normal machine code; outcomes by kernel."""
    return fuzz()


@pytest.fixture(scope="session")
def checked(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcomes]:
    """Return a function that fuzzes the named kernels with bounds checks in compiled loops."""
    # A folder of its own, so that no other process uses machine code with bounds checks.
    folder = kept_folder(pytestconfig, "checked-kernels", ROOT / "serve" / "ops")
    folder = folder or tmp_path_factory.mktemp("checked")
    return lambda *kernels: fuzz(*kernels, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(folder))


@pytest.fixture(scope="session")
def checked_outcomes(checked: Callable[..., Outcomes]) -> Outcomes:
    return checked()


@pytest.fixture(scope="session")
def some_checked_outcomes(checked: Callable[..., Outcomes]) -> Outcomes:
    return checked(*CHECKED_ALWAYS)


def fuzz(*kernels: str, **variables: str) -> Outcomes:
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.ops.fuzz_kernels", *kernels],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, (
        f"the process exited with {ran.returncode} at {lines[-1:]}: {ran.stderr[-2000:]}"
    )
    found = defaultdict(list)
    for line in map(json.loads, lines):
        if "outcome" in line:
            found[line["kernel"]].append(line)
    return found


def test_every_kernel_has_a_valid_call():
    assert set(CASES) | NO_TENSORS == set(extension.kernels())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", sorted(CASES))
def test_corrupted_argument_is_named_or_harmless(kernel, outcomes):
    assert_harmless(kernel, outcomes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", CHECKED_ALWAYS)
def test_corrupted_argument_stays_within_bounds_of_selected_kernels(kernel, some_checked_outcomes):
    assert_harmless(kernel, some_checked_outcomes)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernel", sorted(CASES))
def test_corrupted_argument_stays_within_bounds_of_all_kernels(kernel, checked_outcomes):
    assert_harmless(kernel, checked_outcomes)


def assert_harmless(kernel: str, outcomes: Outcomes) -> None:
    faults = [one for one in outcomes[kernel] if (why := find_fault(one)) and one.setdefault("why", why)]
    assert not faults, "\n".join(
        f"{one['argument']}, {one['change']}: {one['why']} {one.get('message', '')}" for one in faults
    )
    assert {one["argument"] for one in outcomes[kernel]}, "no argument was corrupted"


def find_fault(one: dict[str, str]) -> str:
    """Return what is wrong with an outcome; empty if nothing."""
    parameters = inspect.signature(extension.kernels()[one["kernel"]]).parameters
    if one["outcome"] == "error":
        named = any(re.search(rf"\b{re.escape(name)}\b", one["message"]) for name in (*parameters, *RULEBOOK))
        return "" if named else "the error names no argument:"
    if one["outcome"] == "foreign":
        return f"unexpected exception {one['type']}:"
    if one["outcome"] == "random":
        return "the result depends on the contents of free memory"
    if one["outcome"] == "other" and not is_valid(one):
        return "another result without an error"
    return ""


# Names of `get_indice_pairs_*_forward` for the arguments of `get_indice_pairs_*_backward` after its first two.
RULEBOOK = ("batch_size", "spatial_shape", "out_shape", "ksize")


def is_valid(one: dict[str, str]) -> bool:
    number = re.fullmatch(r"-?\d+ for -?\d+", one["change"])
    return (
        number is not None
        or one["change"] in NOT_FINITE
        or any(
            re.fullmatch(kernel, one["kernel"])
            and re.fullmatch(argument, one["argument"])
            and re.search(change, one["change"])
            for kernel, argument, change in VALID
        )
    )


def test_find_fault_reports_each_kind_of_harm():
    base = {"kernel": "nms", "argument": "boxes", "change": "shorter along 0"}
    assert find_fault({**base, "outcome": "foreign", "type": "RuntimeError", "message": "boxes"})
    assert find_fault({**base, "outcome": "error", "type": "IndexError", "message": "index is out of bounds"})
    assert find_fault({**base, "outcome": "random"}) and find_fault({**base, "outcome": "other"})
    assert not find_fault(
        {**base, "outcome": "error", "type": "ValueError", "message": "scores must be (11,)"}
    )
    assert names(extension.kernels()["nms"], 4) == ["boxes", "scores", "iou_threshold", "offset"]
    assert len(CASES["nms"](Inputs(False))) == 4
