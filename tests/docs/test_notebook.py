"""The notebook's cells run in order and hold no results of one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "inference_demo.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_no_output_is_kept():
    assert all(cell["outputs"] == [] for cell in cells() if cell["cell_type"] == "code")


@pytest.mark.slow
def test_cells_run_in_order_and_find_the_objects_of_the_cloud(tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    code += (
        "\nprint(drawn.shape, seen.shape, len(result.pred_instances_3d), len(prediction.answer['scores_3d']))"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    last = ran.stdout.splitlines()[-1]
    assert last.startswith("(144, 192, 3) (900, 1200, 3) ")
    assert all(int(count) > 2 for count in last.split()[-2:])
