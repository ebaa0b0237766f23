"""``python -m tools.seed_rows``: run the rows, keep what came of them, and write docs/upstream-commands.md."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

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
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not args.page:
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-rows-") as scratch:
            folder = (args.folder or Path(scratch, "rows")).resolve()
            if not folder.exists():
                prepare(folder)
            for row in ROWS:
                if row.check and (args.only is None or row.number in args.only):
                    results[str(row.number)] = run(row, folder)
                    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results), encoding="utf-8")
    failed = [
        row.number for row in ROWS if row.check and results.get(str(row.number), {}).get("result") == "failed"
    ]
    print(f"{PAGE.relative_to(ROOT)}: {len(ROWS)} rows, {len(failed)} failed {failed or ''}")
    return 1 if failed else 0


def run(row: Row, folder: Path) -> dict[str, Any]:
    """Run the check of one row."""
    began = time.monotonic()
    try:
        ran = subprocess.run(
            ["bash", "-c", row.check],
            cwd=folder,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        output = ran.stdout
        found = re.search(row.expect, output, re.MULTILINE)
    except subprocess.TimeoutExpired:
        output, found = f"stopped after {_TIMEOUT_S} s", None
    seconds = time.monotonic() - began
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
Seconds are of a busy machine. Rows 45, 87 and 88 ran in an environment of `make setup-train`.
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
