"""``python -m tools.bench serving``: the gateway against TorchServe alone, LitServe, mosec and BentoML."""

from __future__ import annotations

import argparse
import datetime
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve.cli.entry import bounded
from serve.cli.serve import stoppable
from tools.bench.serving.report import Report
from tools.bench.serving.runs import Machine, Plan, Result, measure, priority
from tools.bench.serving.targets import GATEWAY, GATEWAY_HTTP, PEERS, Workload, sleep_archive
from tools.commands import replace_renamed

__all__ = ["main"]

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "benchmarks" / "serving.md"
SIZES = (16_000, 276_000, 2_000_000)
BATCHES = ((8, 5), (8, 100), (16, 5), (16, 100))
QUICK_BATCHES = ((8, 100), (16, 5))


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, measure, print tables and then one line of JSON."""
    names = [
        GATEWAY,
        GATEWAY_HTTP,
        "TorchServe batch 1",
        *(f"TorchServe batch {n}, {ms} ms" for n, ms in BATCHES),
        *PEERS,
    ]
    parser = argparse.ArgumentParser(
        description="Measure our gateway in front of TorchServe against TorchServe alone, LitServe, mosec and "
        "BentoML: the same model, the same load over loopback, in alternating rounds. Prints tables and one line of "
        "JSON; takes about 13 minutes."
    )
    parser.add_argument("--quick", action="store_true", help="16 kB frames only, short rounds: below 90 s")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=("sleep", "second"),
        default=["sleep", "second"],
        help="sleep: 20 ms per batch and 2 ms per frame; second: the demo detector (default: both)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, default=(), metavar="NAME", help=f"targets: {', '.join(names)}"
    )
    parser.add_argument(
        "--rounds",
        type=bounded(int, 1, 20),
        metavar="N",
        help="rounds per target (default: 3, 2, 1 by frame size)",
    )
    parser.add_argument(
        "--retries",
        type=bounded(int, 0, 20),
        default=0,
        metavar="N",
        help="repeat a measurement with more than 2 %% of CPU steal time up to N times and keep the one with the "
        "least (default: 0)",
    )
    parser.add_argument(
        "--bench-python",
        type=Path,
        default=ROOT / ".venv-bench" / "bin" / "python",
        metavar="PYTHON",
        help="Python of LitServe, mosec and BentoML; `make bench-env` creates it (default: %(default)s)",
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="update docs/benchmarks/serving.md and its figures"
    )
    args = parser.parse_args(replace_renamed(argv, {"--patience": "--retries", "slept": "sleep"}))
    load_before = os.getloadavg()[0]
    with stoppable(), tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bench-") as folder:
        results = _measure(args, Path(folder))
    spent = [result.others for result in results]
    machine = Machine(
        os.cpu_count() or 1,
        load_before,
        sum(spent) / len(spent),
        os.getloadavg()[0],
        priority(),
        sum(result.steal for result in results) / len(results),
    )
    report = Report(results, machine, datetime.date.today().isoformat(), args.quick)
    print(report.table())
    if args.write_docs:
        for path in report.write_page(PAGE):
            print(f"wrote {path.relative_to(ROOT)}")
    print(report.json_line(), flush=True)
    return 0


def _measure(args: argparse.Namespace, folder: Path) -> list[Result]:
    todo: list[tuple[Workload, list[Plan]]] = []
    if "sleep" in args.models:
        batches = QUICK_BATCHES if args.quick else BATCHES
        workload = Workload("sleep", sleep_archive(folder), "sleep", batches, reports_batch=True)
        todo.append((workload, _sleep_plans(args)))
    if "second" in args.models and not (args.quick and len(args.models) > 1):
        todo.append((_second(folder), [_second_plan(args)]))
    results: list[Result] = []
    bar: tqdm[Any]
    total = sum(
        plan.measurements() * (len(args.only) or 3 + len(workload.batches) + len(PEERS))
        for workload, plans in todo
        for plan in plans
    )
    with tqdm(total=total, unit="measurement", file=sys.stderr) as bar:
        for workload, plans in todo:
            results += measure(
                workload,
                plans,
                folder,
                args.bench_python.absolute(),
                only=args.only,
                retries=args.retries,
                announce=lambda name: bar.set_description(f"starting {name}"),
                progress=lambda done: _tick(bar, done),
            )
    return results


def _tick(bar: tqdm[Any], done: int) -> None:
    bar.set_description("measuring")
    bar.update(done)


def _sleep_plans(args: argparse.Namespace) -> list[Plan]:
    rng = random.Random(0)
    small, medium, large = (rng.randbytes(size) for size in SIZES)
    if args.quick:
        return [Plan(small, args.rounds or 1, 0.6, 100.0, 2.0, 64, 1.2, warmup_s=0.8)]
    return [
        Plan(small, args.rounds or 3, 0.8, 100.0, 4.0, 64, 1.8, warmup_s=1.5),
        Plan(medium, args.rounds or 2, 0.6, 100.0, 2.0, 64, 1.6),
        Plan(large, args.rounds or 1, 0.6, 0.0, 0.0, 64, 2.0),
    ]


def _second_plan(args: argparse.Namespace) -> Plan:
    from serve.synthetic.scenes import sample_frame

    seconds = 3.0 if args.quick else 4.0
    return Plan(sample_frame(), 1, seconds / 2, 0.0, 0.0, 8, seconds)


def _second(folder: Path) -> Workload:
    from serve import archive
    from serve.cli.demo import CHECKPOINT, CONFIG
    from serve.convert import Conversion, convert

    made = convert(Conversion(CONFIG, CHECKPOINT, folder, "second"))
    opened = folder / "second"
    opened.mkdir()
    archive.extract(made.path, opened)
    return Workload("second", made.path, str(opened), BATCHES[:2], reports_batch=False)
