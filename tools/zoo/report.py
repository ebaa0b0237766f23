"""Write the results of a sweep as a page, ``docs/coverage.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from tools.zoo.families import Family
from tools.zoo.probe import IMAGE_PX, MAX_MASKS, SHRUNK_PX
from tools.zoo.sweep import Result

__all__ = ["counts", "page"]

_NO_MODELS = ("not a model", "not a per-frame model")
_HEAD = """\
# What of the model zoos is served

Written by `python -m tools.zoo sweep`; do not edit. For every folder of configs in the
installed packages the first config is built with random weights that behave, converted (which proves the
archive on its golden frame in a fresh process), loaded, run on two frames singly and as a batch, and compared
with upstream's own inference call, by the one standard of equality ([decision 14](decisions/0014-equality.md)).
With `--served` the answer compared is that of a real TorchServe over HTTP. Where the first config is not a model
that answers single frames, or wants a package, the next ones of its folder are tried.

Images inside the networks are limited to {inside} pixels, the image sent is {image}, and detections with
masks are at most {masked}, so that the sweep ends on a small machine; nothing else of a config is changed. Random
weights do not measure how well a model detects, only that the predictions are equal.

Versions: {versions}. Rows by the commit of the sources they were tried with: {commits}.
"""
_FOOT = """\
*answers* are detections (segments, labelled points) of the golden frame; *deviation* is the largest between what
is served and what upstream's call gives, *tied* the detections that rounding decides, *served* whether that answer
came from a TorchServe. *with the zoo extra* means after
`pip install --no-build-isolation --editable '.[zoo]'`."""


def page(families: Sequence[Family], results: Sequence[Result], versions: Mapping[str, str]) -> str:
    """Format the whole page.

    Args:
        families: all families of the zoos; each gets a row.
        results: their results.
        versions: package name → version, named on the page.
    """
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    image, inside = (f"{width} x {height}" for width, height in (IMAGE_PX, SHRUNK_PX))
    lines = [
        _HEAD.format(
            inside=inside, image=image, masked=MAX_MASKS, versions=named, commits=_commits(families, results)
        ),
        *counts(families, results),
        "",
        _FOOT,
    ]
    for package in dict.fromkeys(family.package for family in families):
        lines += [
            "",
            f"## {package}",
            "",
            "| family | config | modality | status | served | answers | deviation | remark |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(family, _of(family, results)) for family in families if family.package == package]
    return "\n".join(lines) + "\n"


def counts(families: Sequence[Family], results: Sequence[Result]) -> list[str]:
    """Format one line per package: how many families are served."""
    lines = []
    for package in dict.fromkeys(family.package for family in families):
        mine = [family for family in families if family.package == package]
        best = [_best(_of(family, results)) for family in mine]
        works = [result for result in best if result and result.probe.status == "works"]
        plain = sum(not result.extra for result in works)
        untried = sum(not result and bool(family.configs) for family, result in zip(mine, best, strict=True))
        odd = sum(
            not family.configs or (result is not None and result.probe.status in _NO_MODELS)
            for family, result in zip(mine, best, strict=True)
        )
        models = len(mine) - odd
        lines.append(
            f"* **{package}: {len(works)} of {len(mine)} families are served** ({plain} as set up, "
            f"{len(works) - plain} more with the zoo extra); {odd} are no per-frame models, so that is "
            f"{len(works)} of {models} ({100 * len(works) / max(1, models):.0f} %)"
            + (f"; {untried} are not tried yet." if untried else ".")
        )
    return lines


def _commits(families: Sequence[Family], results: Sequence[Result]) -> str:
    """Format how many rows are of which commit, the most first."""
    best = [_best(_of(family, results)) for family in families]
    rows = Counter(f"`{row.commit}`" if row.commit else "not recorded" for row in best if row is not None)
    return ", ".join(f"{commit} {count}" for commit, count in rows.most_common()) or "none"


def _of(family: Family, results: Sequence[Result]) -> list[Result]:
    return sorted(
        (result for result in results if result.family == family.key),
        key=lambda result: (result.extra, result.position),
    )


def _best(results: Sequence[Result]) -> Result | None:
    """Choose the result of a row: the first that works, preferably without the zoo extra, else the first config's."""
    working = [result for result in results if result.probe.status == "works"]
    if working:
        return working[0]
    tried = [result for result in results if result.probe.status not in _NO_MODELS]
    telling = [result for result in tried if result.extra] or tried or list(results)
    return telling[0] if telling else None


def _row(family: Family, results: Sequence[Result]) -> str:
    best = _best(results)
    if not family.configs:
        return _cells(family.name, "", "", "not a model", "", "", "", "the wheel has no config of it")
    if best is None:
        return _cells(family.name, family.configs[0].stem, "", "not tried", "", "", "", "")
    probe = best.probe
    status = probe.status
    if status == "works" and best.extra:
        status = "works with the zoo extra"
    elif status == "needs package":
        status = f"needs {', '.join(probe.packages)}"
    remarks = [probe.reason] if probe.reason and probe.status != "needs package" else []
    if best.position:
        first = next((result for result in results if result.position == 0), None)
        if first is not None:
            why = first.probe.reason
            if first.probe.status == "needs package":
                why = f"needs {', '.join(first.probe.packages)}"
            remarks.insert(0, f"first config {first.probe.config}: {first.probe.status}, {why}")
    answers = "" if probe.answers is None else str(probe.answers)
    return _cells(
        family.name,
        probe.config,
        probe.modality,
        status,
        "yes" if probe.served and probe.status == "works" else "",
        answers,
        probe.deviation,
        "; ".join(remarks),
    )


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
