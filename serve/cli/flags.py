"""Flags generated from classes of options: ``--help`` shows the common ones, ``--help-all`` every one."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from serve.settings import RENAMED, OptionInfo, Options, warn_renamed

__all__ = ["add_flags", "add_help_all", "show_default", "values_of"]


def add_help_all(parser: argparse.ArgumentParser) -> None:
    """Add ``--help-all``, and shorten the usage line, which would list every flag."""
    parser.usage = f"{parser.prog} [OPTION ...]"
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option and exit")


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type[Options],
    *,
    title: str | None,
    prefix: str = "",
    only: Collection[str] = (),
    leave_out: Collection[str] = (),
    common: Collection[str] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Add a flag per option; `values_of` gives what they were set to, as texts for `Options.build`.

    Args:
        parser: command line.
        cls: class of options.
        title: of the group in the help text; None adds to the parser's own options.
        prefix: of every flag, such as ``gateway-``.
        only: fields to offer; empty offers all.
        leave_out: fields not to offer.
        common: fields that ``--help`` shows; None takes those declared common.
        defaults: defaults of this command by field name, if they are not those of the class.
    """
    group = parser if title is None else parser.add_argument_group(title)
    for each in cls.options():
        if not each.flag or each.name in leave_out or (only and each.name not in only):
            continue
        shown = not each.private and (each.common if common is None else each.name in common)
        flag = f"--{prefix}{each.name.replace('_', '-')}"
        dest = _dest(cls, each.name)
        described = _help(each, (defaults or {}).get(each.name, each.default))
        help_text = described if shown else argparse.SUPPRESS
        action: argparse.Action
        if each.kind is bool:
            action = group.add_argument(
                flag, dest=dest, nargs="?", const="true", metavar="true|false", help=help_text
            )
            negated = f"--{prefix}no-{each.name.replace('_', '-')}"
            group.add_argument(
                negated, dest=dest, action="store_const", const="false", help=argparse.SUPPRESS
            )
        else:
            how: dict[str, Any] = {"action": "append"} if each.kind is tuple else {}
            action = group.add_argument(flag, dest=dest, metavar=_metavar(each), help=help_text, **how)
        if not each.private:
            action.full_help = described  # type: ignore[attr-defined]
        for former in each.former:
            if former.startswith(cls.SCOPE):
                old = f"--{prefix}{former.removeprefix(cls.SCOPE).replace('_', '-')}"
                if old != flag:
                    group.add_argument(
                        old, dest=dest, action=_RenamedFlag, now=flag, kind=each.kind, former=former,
                        help=argparse.SUPPRESS,
                    )  # fmt: skip


def values_of(args: argparse.Namespace, cls: type[Options]) -> dict[str, object]:
    """Collect the given flags of a class, by field name; fields without a flag are omitted."""
    begin = _dest(cls, "")
    return {
        name.removeprefix(begin): value
        for name, value in vars(args).items()
        if name.startswith(begin) and value is not None
    }


def show_default(value: object, unit: str) -> str:
    """Format a default for people: ``33554432 (32 MiB)``, ``none``."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if unit == "BYTES" and isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value}, {value >> 20} MiB"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _dest(cls: type[Options], name: str) -> str:
    return f"{cls.__name__}.{name}"


def _metavar(each: OptionInfo) -> str:
    return each.unit or each.accepts.replace(", ", "|").replace(" or ", "|")


def _help(each: OptionInfo, default: object) -> str:
    text = f"{each.description} (default: {show_default(default, each.unit)})"
    return text.replace("%", "%%")


class _HelpAll(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()


class _RenamedFlag(argparse.Action):
    """A former flag: warns, and sets the option that it is called now."""

    def __init__(self, option_strings: Sequence[str], dest: str, **given: Any) -> None:
        self.now, self.kind, self.factor = (
            given.pop("now"),
            given.pop("kind"),
            RENAMED[given.pop("former")].factor,
        )
        super().__init__(option_strings, dest, **given)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        warn_renamed(str(option_string), self.now)
        value: object = values
        if self.factor != 1 and isinstance(values, str) and values.strip().isdigit():
            value = str(int(values) * self.factor)
        if self.kind is tuple:
            value = [*(getattr(namespace, self.dest) or []), value]
        setattr(namespace, self.dest, value)
