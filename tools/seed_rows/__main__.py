"""``python -m tools.seed_rows``: run the rows, keep what came of them, and write docs/upstream-commands.md."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tools.seed_rows.bucket import filled_bucket
from tools.seed_rows.rows import ROWS, Row
from tools.seed_rows.work_folder import ROOT, environment, prepare

PAGE = ROOT / "docs" / "upstream-commands.md"
RESULTS = Path(__file__).with_name("results.json")
_PARTS = {
    1: "Back ends: Ceph (MMDetection3D)",
    17: "Back ends: Amazon S3 (mmcv, MMDetection)",
    27: "FFRecord",
    33: "MMDetection: inference, test, train",
    72: "MMDetection3D: useful tools",
}
_TIMEOUT_S = 600


def main(argv: list[str] | None = None) -> int:
    """Run rows and write the page; 1 if one failed."""
    parser = argparse.ArgumentParser("python -m tools.seed_rows", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="N", help="these rows; others keep their result"
    )
    parser.add_argument("--folder", type=Path, help="folder that is kept, and used again if it is prepared")
    parser.add_argument(
        "--page", action="store_true", help="write the page from the kept results, run nothing"
    )
    args = parser.parse_args(argv)
    results = read_results()
    if not args.page:
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-rows-") as scratch:
            folder = (args.folder or Path(scratch, "rows")).resolve()
            if not folder.exists():
                prepare(folder)
            chosen = [row for row in ROWS if row.check and (args.only is None or row.number in args.only)]
            run_all(chosen, folder, results)
    PAGE.write_text(page(results), encoding="utf-8")
    failed = [
        row.number for row in ROWS if row.check and results.get(str(row.number), {}).get("result") == "failed"
    ]
    print(f"{PAGE.relative_to(ROOT)}: {len(ROWS)} rows, {len(failed)} failed {failed or ''}")
    return 1 if failed else 0


def run_all(rows: list[Row], folder: Path, results: dict[str, Any]) -> None:
    """Run the checks of rows, and keep each result at once."""
    outputs: dict[str, tuple[str, float]] = {}
    with ExitStack() as servers:
        variables = environment(folder)
        if any(row.needs == "bucket" for row in rows):
            variables |= servers.enter_context(filled_bucket(folder))
        for row in rows:
            if row.needs == "train" and importlib.util.find_spec("nuimages") is None:
                print(f"{row.number:>3} not run: `make setup-train` first; its former result stays")
                continue
            if row.check not in outputs:
                outputs[row.check] = run(row.check, folder, variables)
            results.update(read_results())  # of another run of other rows at the same time
            results[str(row.number)] = judge(row, *outputs[row.check])
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def read_results() -> dict[str, Any]:
    """Read the kept results, by number of the row."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return kept


def run(check: str, folder: Path, variables: dict[str, str]) -> tuple[str, float]:
    """Run a shell command; returns its output and the seconds that it took."""
    began = time.monotonic()
    try:
        ran = subprocess.run(
            ["bash", "-c", check],
            cwd=folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        output = ran.stdout
    except subprocess.TimeoutExpired:
        output = f"stopped after {_TIMEOUT_S} s"
    return output, time.monotonic() - began


def judge(row: Row, output: str, seconds: float) -> dict[str, Any]:
    """Tell whether the output of a row's check is what it must be."""
    found = re.search(row.expect, output, re.MULTILINE)
    print(f"{row.number:>3} {'ran' if found else 'FAILED'} {seconds:5.1f} s  {row.line}", flush=True)
    if not found:
        print("".join(f"      {line}\n" for line in output.splitlines()[-12:]), file=sys.stderr, flush=True)
    today = datetime.date.today().isoformat()
    return {"result": "ran" if found else "failed", "seconds": round(seconds), "date": today}


def page(results: dict[str, Any]) -> str:
    """Write the page from the rows and their results."""
    counts = Counter(outcome(row, results).partition(" ")[0] for row in ROWS)
    text = f"""# Upstream's commands

What the documentation of MMDetection and MMDetection3D prints, line by line, and the command of today.
`python -m tools.seed_rows` runs the rows on small data sets that it makes, and writes this page:
{len(ROWS)} rows, {counts["ran"]} ran, {counts["failed"]} failed, {counts["not"]} not run by it.

"Same" means as upstream prints it, inside an environment of `make setup`. Scripts are commands:
`python tools/train.py` is `mmdet3d-serve train`, `python tools/X.py` is `mmdet3d-serve tools X`.
Former flags are translated, and a line names the new form.
Seconds are of a busy machine; rows that share a run have the same. The S3 server is moto, on the same machine.
Rows {", ".join(str(row.number) for row in ROWS if row.needs == "train")} ran in an environment of `make setup-train`.
"""
    for row in ROWS:
        if row.number in _PARTS:
            text += f"\n## {_PARTS[row.number]}\n\n| # | upstream | here | result |\n|---|---|---|---|\n"
        text += f"| {row.number} | {_cell(row.line)} | {_cell(row.ours)} | {_cell(outcome(row, results))} |\n"
    return text


def outcome(row: Row, results: dict[str, Any]) -> str:
    """Last column of a row."""
    if not row.check:
        return f"not run by the script: {row.reason}"
    kept = results.get(str(row.number))
    return "not run yet" if kept is None else f"{kept['result']} on {kept['date']}, {kept['seconds']} s"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
