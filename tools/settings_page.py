"""Write docs/settings.md from the classes of options.

python -m tools.settings_page            write the page
python -m tools.settings_page --check    exit with 1 if the page is not current
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from serve.cli.flags import show_default
from serve.cli.serve import KNOWN_TO_SERVE
from serve.gateway.options import GatewayOptions
from serve.labelling.options import LabelStudioOptions
from serve.settings import PREFIX, RENAMED, OptionInfo, Options, Settings
from serve.torchserve import TorchServeOptions

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

HEAD = f"""# Settings

This page is generated: `python -m tools.settings_page`.

A flag goes before its environment variable, and that before the default.
Every variable begins with `{PREFIX}`; an unknown one, or a wrong value, stops the start with exit code 2 and a
message that names it.
Variables that Kubernetes adds for a Service called `mmdet3d-serve` are passed over.
A list is separated by commas; its flag may also be repeated.
A switch takes `true` or `false`; as a flag alone it means `true`, and `--no-…` means `false`.
A path or number that may be left out takes `none`.
`--help` shows the common flags, `--help-all` every one.
"""


def render() -> str:
    """Generate the text of docs/settings.md."""
    parts = [
        HEAD,
        "## Every process\n\nOf these, `--workers` is a flag of `mmdet3d-serve serve`, and `--open-management` one of "
        "`serve` and `demo`.\n",
        _table(Settings, flags={"workers": "--workers", "open_management": "--open-management"}),
        "## Gateway\n\nFlags of `mmdet3d-serve gateway`. `mmdet3d-serve serve` and `mmdet3d-serve demo` have them as "
        "`--gateway-…`, except those marked *: the supervisor sets them, and `max_frame_bytes` is set by its variable, "
        "because workers read it too.\n",
        _table(
            GatewayOptions,
            flags={
                each.name: _flag(each) + (" *" if each.name in KNOWN_TO_SERVE else "")
                for each in GatewayOptions.options()
                if each.flag
            },
        ),
        "## Label Studio\n\nFlags of `mmdet3d-serve label-studio` ([Labelling](labelling.md)).\n",
        _table(
            LabelStudioOptions,
            flags={each.name: _flag(each) for each in LabelStudioOptions.options() if each.flag},
        ),
        "## TorchServe\n\nFlags of `mmdet3d-serve serve` and `demo`; they have no variables. Both set `state_dir` "
        "to `.state`, but for `--container`.\n",
        _table(TorchServeOptions, flags={each.name: _flag(each) for each in TorchServeOptions.options()}),
        "## Former names\n\nUnderstood until 0.3, with a warning.\n",
        _renamed(),
    ]
    return "\n".join(parts)


def _table(cls: type[Options], flags: dict[str, str]) -> str:
    columns = ["Variable"] if cls.HAS_VARIABLES else []
    columns += ["Flag", "Default", "Values", "Meaning"]
    rows = [columns, ["---"] * len(columns)]
    for each in cls.options():
        if each.private:
            continue
        cells = [f"`{each.variable}`"] if each.variable else []
        default = show_default(each.default, each.unit)
        flag, star, _ = flags.get(each.name, "").partition(" *")
        cells += [f"`{flag}`{star}" if flag else "", f"`{default}`", each.accepts, each.description]
        rows.append(cells)
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _renamed() -> str:
    rows = ["| Former | Now |\n", "| --- | --- |\n"]
    for cls in (Settings, GatewayOptions, TorchServeOptions):
        for each in cls.options():
            for former in each.former:
                old = former.removeprefix(cls.SCOPE)
                if cls.HAS_VARIABLES:
                    rows.append(f"| `{PREFIX}{former.upper()}` | `{each.variable}` |\n")
                if cls is not Settings and old != each.name:
                    factor = RENAMED[former].factor
                    note = f", value × {factor}" if factor != 1 else ""
                    rows.append(f"| `--{old.replace('_', '-')}` | `{_flag(each)}`{note} |\n")
    rows.append(f"| `{PREFIX}GATEWAY_WORKER_SOCKETS=none` | `{PREFIX}GATEWAY_DIRECT_BATCHES=false` |\n")
    rows.append("| `--worker-sockets none` | `--no-direct-batches` |\n")
    return "".join(dict.fromkeys(rows))


def _flag(each: OptionInfo) -> str:
    return f"--{each.name.replace('_', '-')}"


def write_or_check(program: str, description: str | None, page: Path, render: Callable[[], str]) -> int:
    """Run the command line of a generated page; returns its exit status.

    Args:
        program: how the command is called.
        description: text of ``--help``.
        page: the file.
        render: generates its text.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the page is not current"
    )
    args = parser.parse_args()
    text = render()
    if args.check:
        current = page.exists() and page.read_text() == text
        print(f"{page.name} is {'current' if current else f'not current; run {program}'}")
        return 0 if current else 1
    page.write_text(text)
    print(page)
    return 0


def main() -> int:
    """Write the page, or check it."""
    return write_or_check("python -m tools.settings_page", __doc__, PAGE, render)


if __name__ == "__main__":
    sys.exit(main())
