"""No argument, however spoilt, ends the process or gives a silent wrong answer: every kernel, every tensor argument.

`fuzz_kernels` does the calling, in a process of its own. A kernel that reads foreign memory is found out there by
answers that differ with what lies in free memory; where compiled loops check their bounds (some kernels in `make
test`, all of them in `make test-soak`), also where it would have done no harm.
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

# Changes that make another valid call, with another answer: kernel (a pattern), argument, change (a pattern).
VALID = [
    # A single argument says how many there are of something, or how large a map is.
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
    # Empty stands for none.
    ("deform_roi_pool_forward", "offset", "nothing along"),
    ("sync_bn_forward_output", "running_mean", "nothing along"),
    # Out of range has a meaning: no neighbour, background, dropped, shifted out of the picture, any place in space.
    ("assign_score_withk_.*", "knn_idx", "an index"),
    ("s.*_focal_loss_.*", "target", "an index of -7"),
    ("dynamic_point_to_voxel_.*", "coors|coors_idx", "an index"),
    ("tin_shift_.*", "shift", "an index"),
]  # fmt: skip
# Arithmetic goes on with these; what is asked is that two calls agree and nothing outside is read.
NOT_FINITE = {"one NaN", "all NaN", "infinite", "enormous"}


Outcomes = dict[str, list[dict[str, str]]]
# Checked bounds in `make test` too: a kernel of boxes, of points, of a grid, and of images.
CHECKED_ALWAYS = ("nms", "points_in_boxes_part_forward", "hard_voxelize_forward", "roi_align_forward")


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """Per kernel what came of its calls, with the machine code that everybody runs."""
    return fuzzed()


@pytest.fixture(scope="session")
def checked(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcomes]:
    """`checked("nms")`: what came of the calls of these kernels where loops check their bounds."""
    # Machine code that checks bounds is not for others to find.
    folder = kept_folder(pytestconfig, "checked-kernels", ROOT / "serve" / "ops")
    folder = folder or tmp_path_factory.mktemp("checked")
    return lambda *kernels: fuzzed(*kernels, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(folder))


@pytest.fixture(scope="session")
def checked_outcomes(checked: Callable[..., Outcomes]) -> Outcomes:
    return checked()


@pytest.fixture(scope="session")
def some_checked_outcomes(checked: Callable[..., Outcomes]) -> Outcomes:
    return checked(*CHECKED_ALWAYS)


def fuzzed(*kernels: str, **variables: str) -> Outcomes:
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.ops.fuzz_kernels", *kernels],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, (
        f"the process ended with {ran.returncode} at {lines[-1:]}: {ran.stderr[-2000:]}"
    )
    found = defaultdict(list)
    for line in map(json.loads, lines):
        if "came" in line:
            found[line["kernel"]].append(line)
    return found


def test_every_kernel_has_an_honest_call():
    assert set(CASES) | NO_TENSORS == set(extension.kernels())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", sorted(CASES))
def test_a_spoilt_argument_is_named_or_does_no_harm(kernel, outcomes):
    judge(kernel, outcomes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", CHECKED_ALWAYS)
def test_no_loop_leaves_its_arrays_whatever_argument_is_spoilt(kernel, some_checked_outcomes):
    judge(kernel, some_checked_outcomes)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernel", sorted(CASES))
def test_no_loop_of_any_kernel_leaves_its_arrays_whatever_argument_is_spoilt(kernel, checked_outcomes):
    judge(kernel, checked_outcomes)


def judge(kernel: str, outcomes: Outcomes) -> None:
    wrong = [one for one in outcomes[kernel] if (why := complaint(one)) and one.setdefault("why", why)]
    assert not wrong, "\n".join(
        f"{one['argument']}, {one['change']}: {one['why']} {one.get('words', '')}" for one in wrong
    )
    tried = {one["argument"] for one in outcomes[kernel]}
    assert tried, "nothing was tried"


def complaint(one: dict[str, str]) -> str:
    """What is wrong about an outcome; empty where nothing is."""
    parameters = inspect.signature(extension.kernels()[one["kernel"]]).parameters
    if one["came"] == "error":
        told = any(re.search(rf"\b{re.escape(name)}\b", one["words"]) for name in (*parameters, *RULEBOOK))
        return "" if told else "the error names no argument:"
    if one["came"] == "foreign":
        return f"an error that is not ours, {one['type']}:"
    if one["came"] == "random":
        return "the answer depends on what lies in free memory"
    if one["came"] == "other" and not is_valid(one):
        return "another answer, and no error"
    return ""


# What `get_indice_pairs_*_backward` takes after its first two, as `get_indice_pairs_*_forward` calls it.
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


def test_an_unfinished_kernel_would_be_noticed():
    """The judge itself: each kind of harm is a complaint."""
    base = {"kernel": "nms", "argument": "boxes", "change": "shorter along 0"}
    assert complaint({**base, "came": "foreign", "type": "RuntimeError", "words": "boxes"})
    assert complaint({**base, "came": "error", "type": "IndexError", "words": "index is out of bounds"})
    assert complaint({**base, "came": "random"}) and complaint({**base, "came": "other"})
    assert not complaint({**base, "came": "error", "type": "ValueError", "words": "scores must be (11,)"})
    assert names(extension.kernels()["nms"], 4) == ["boxes", "scores", "iou_threshold", "offset"]
    assert len(CASES["nms"](Inputs(False))) == 4
