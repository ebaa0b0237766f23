"""The one mechanism by which all classes of options are declared, read and checked.

An option is a field of a class derived from `Options`: its annotation, range and description become the variable
(``MMDET3D_SERVE_<NAME>``), the flag (`serve.cli.flags`), the help text, ``docs/settings.md`` and the message
that rejects a wrong value.
"""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    Union,
    get_args,
    get_origin,
)

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.dataclasses import dataclass

from serve.errors import SettingsError
from serve.settings.names import PREFIX, RENAMED, SCOPES, did_you_mean, is_service_link, warn_renamed

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = [
    "CONFIG",
    "FilePath",
    "Flag",
    "Names",
    "OptionInfo",
    "OptionalCount",
    "OptionalPath",
    "OptionalText",
    "Options",
    "Text",
    "option",
]

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def _boolean(value: object) -> object:
    return False if value == "" else value


def _names(value: object) -> object:
    """Split texts at commas; blanks go."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    return tuple(part.strip() for text in texts for part in str(text).split(",") if part.strip())


def _none(value: object) -> object:
    return None if value == "none" else value


def _path(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must be a path, or unset")
    return value


def _text(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must be a value, or unset")
    return value


# How texts of flags and variables become values.
Flag = Annotated[bool, BeforeValidator(_boolean)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
FilePath = Annotated[Path, BeforeValidator(_path)]
OptionalPath = Annotated[Path | None, BeforeValidator(_path), BeforeValidator(_none)]
Text = Annotated[str, BeforeValidator(_text)]
OptionalText = Annotated[str | None, BeforeValidator(lambda value: value or None), BeforeValidator(_none)]
OptionalCount = Annotated[int | None, BeforeValidator(_none)]


def option(
    default: Any,
    unit: str,
    description: str,
    *,
    common: bool = False,
    flag: bool = True,
    private: bool = False,
    **field: Any,
) -> Any:
    """Declare an option.

    Args:
        default: its default.
        unit: unit of its values as help texts show it (``BYTES``, ``S``, ``N``); empty if it has none.
        description: noun phrase or imperative, without range and default.
        common: show it under ``--help``; others only under ``--help-all``.
        flag: offer a flag; without one, it is set by variable or in Python.
        private: passed from one process of a service to another; no help text, page or suggestion shows it.
        **field: further arguments of `pydantic.Field`, such as ``ge=1``.
    """
    return Field(
        default,
        description=description,
        json_schema_extra={"unit": unit, "common": common, "flag": flag, "private": private},
        **field,
    )


class Spelling(dict[str, str]):
    """Names of fields as the user wrote them (flag or variable), and unchanged for the others."""

    def __missing__(self, name: str) -> str:
        return name


@plain_dataclass(frozen=True)
class OptionInfo:
    """One option as help texts and documentation show it.

    Attributes:
        name: field name.
        variable: environment variable; None if there is none.
        flag: whether it has a flag.
        common: whether ``--help`` shows it.
        private: whether help texts and documentation leave it out.
        unit: of its values; may be empty.
        description: what it does.
        accepts: description of the values it takes, to follow "must be".
        default: value if nothing sets it.
        kind: ``bool``, ``tuple`` or another type.
        former: scoped former names, keys of `RENAMED`.
    """

    name: str
    variable: str | None
    flag: bool
    common: bool
    private: bool
    unit: str
    description: str
    accepts: str
    default: Any
    kind: Any
    former: tuple[str, ...]


@dataclass(frozen=True, config=CONFIG)
class Options:
    """Base of all classes of options; a wrong value is a `SettingsError` however it is given.

    Attributes:
        SCOPE: prefix of its names in variables (after `PREFIX`) and in `RENAMED`; one of `SCOPES` if it has variables.
        HAS_VARIABLES: whether its options can be set by environment variables.
        UNSCOPED: fields that share the variable of the same field in `Settings`.
    """

    SCOPE: ClassVar[str] = ""
    HAS_VARIABLES: ClassVar[bool] = True
    UNSCOPED: ClassVar[tuple[str, ...]] = ()
    if TYPE_CHECKING:
        __pydantic_fields__: ClassVar[dict[str, FieldInfo]]

    def __init_subclass__(cls) -> None:
        """Check the scope.

        Raises:
            TypeError: it is not in `SCOPES`, so that `Settings` would refuse its variables.
        """
        if cls.HAS_VARIABLES and cls.SCOPE and cls.SCOPE not in SCOPES:
            raise TypeError(
                f"add the scope {cls.SCOPE!r} of {cls.__name__} to SCOPES of serve.settings.names"
            )

    @model_validator(mode="wrap")
    @classmethod
    def _map_errors(cls, value: Any, handler: Any, info: ValidationInfo) -> Any:
        """Map pydantic's errors to `SettingsError`; the validation context holds the spelling of each name."""
        try:
            built = handler(value)
        except ValidationError as error:
            raise SettingsError(_message(cls, error, info.context or {})) from None
        for message in built.contradictions(Spelling(info.context or {})):
            raise SettingsError(message)
        return built

    def contradictions(self, spelling: Mapping[str, str]) -> Iterator[str]:
        """Yield a message for every pair of values that exclude each other.

        Args:
            spelling: name of each field as messages show it.
        """
        yield from ()

    @classmethod
    def build(
        cls,
        flags: Mapping[str, object] | None = None,
        environ: Mapping[str, str] = os.environ,
        *,
        defaults: Mapping[str, object] | None = None,
        fixed: Mapping[str, object] | None = None,
        flag_prefix: str = "--",
    ) -> Self:
        """Read flags first, then the environment, then `defaults`, then the class's defaults.

        Args:
            flags: texts or values by field name.
            environ: environment variables; unknown ones of this class are rejected.
            defaults: values by field name, for what neither sets.
            fixed: values by field name that nothing else sets.
            flag_prefix: how messages spell a flag.

        Raises:
            SettingsError: an unknown name, an impossible value, or values that contradict each other.
        """
        values = dict(defaults or {})
        spelled: dict[str, str] = {}
        for name, (variable, text) in cls._variables(environ).items():
            values[name], spelled[name] = text, variable
        for name, value in (flags or {}).items():
            values[name], spelled[name] = value, f"{flag_prefix}{name.replace('_', '-')}"
        for name, value in (fixed or {}).items():
            values[name] = value
            spelled.pop(name, None)
        built: Self = TypeAdapter(cls).validate_python(values, context=spelled)
        return built

    def dump(self) -> dict[str, Any]:
        """All values as JSON has them, for `build`."""
        dumped: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return dumped

    @classmethod
    def options(cls) -> list[OptionInfo]:
        """Every option of the class, in the order of its fields."""
        found = []
        for name, field in cls.__pydantic_fields__.items():
            extra = field.json_schema_extra
            if not isinstance(extra, dict) or "unit" not in extra:
                continue
            scoped = cls._scoped(name)
            found.append(
                OptionInfo(
                    name=name,
                    variable=f"{PREFIX}{scoped.upper()}" if cls.HAS_VARIABLES else None,
                    flag=bool(extra["flag"]),
                    common=bool(extra["common"]),
                    private=bool(extra["private"]),
                    unit=str(extra["unit"]),
                    description=field.description or "",
                    accepts=_accepts(field),
                    default=field.get_default(call_default_factory=True, validated_data={}),
                    kind=_kind(field),
                    former=tuple(old for old, new in RENAMED.items() if new.name == scoped),
                )
            )
        return found

    @classmethod
    def _scoped(cls, name: str) -> str:
        return name if name in cls.UNSCOPED else f"{cls.SCOPE}{name}"

    @classmethod
    def _variables(cls, environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Variables of this class by field name, each as it is spelled, with its text."""
        if not cls.HAS_VARIABLES:
            return {}
        known = {cls._scoped(each.name): each.name for each in cls.options()}
        found: dict[str, tuple[str, str]] = {}
        former: dict[str, tuple[str, str]] = {}
        for variable, text in environ.items():
            name = variable.removeprefix(PREFIX).lower()
            if not variable.startswith(PREFIX) or is_service_link(name, text):
                continue
            if name in RENAMED and RENAMED[name].name in known:
                now = RENAMED[name].name
                warn_renamed(variable, f"{PREFIX}{now.upper()}")
                former[known[now]] = (variable, text)
            elif name in known:
                found[known[name]] = (variable, text)
            elif _concerns(cls.SCOPE, name):
                public = {cls._scoped(each.name): each.name for each in cls.options() if not each.private}
                raise SettingsError(f"unknown setting {variable}{did_you_mean(name, public)}")
        return former | found


def _concerns(scope: str, name: str) -> bool:
    """Tell whether an unknown variable is an error of this class: each class answers for its own scope."""
    return name.startswith(scope) if scope else not name.startswith(SCOPES)


def _parts(annotation: Any) -> list[Any]:
    """Members of a type: of a union each, else the type itself; without Annotated."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for each in get_args(annotation) for part in _parts(each)]
    return [annotation]


def _kind(field: FieldInfo) -> Any:
    """Type of a field's values; Literal only if they are nothing else."""
    kinds = [get_origin(each) or each for each in _parts(field.annotation)]
    return next((each for each in kinds if each not in (Literal, type(None))), Literal)


def _bounds(field: FieldInfo) -> Sequence[str]:
    phrases = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return [
        f"{phrases[name]} {getattr(each, name)}"
        for each in field.metadata
        for name in phrases
        if hasattr(each, name)
    ]


def _accepts(field: FieldInfo) -> str:
    """Which values a field takes, to follow "must be"."""
    kind, parts = _kind(field), _parts(field.annotation)
    choices = [str(value) for each in parts if get_origin(each) is Literal for value in get_args(each)]
    if type(None) in parts:
        choices.append("none")
    phrases = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        tuple: "a list of texts",
        str: "a text",
        Path: "a path",
    }
    if kind is not Literal:
        extra = field.json_schema_extra
        unit = extra.get("unit", "") if isinstance(extra, dict) and kind in (int, float) else ""
        bounds = " and ".join(_bounds(field))
        choices.insert(
            0,
            phrases[kind]
            + (f" of {bounds}" if bounds else "")
            + (f" ({unit})" if unit not in ("", "N") else ""),
        )
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def _message(cls: type[Options], error: ValidationError, spelled: Mapping[str, str]) -> str:
    """Describe every invalid option: its spelling, its value and the values it takes."""
    fields = cls.__pydantic_fields__
    sentences = []
    for each in error.errors(include_url=False):
        if not each["loc"]:
            sentences.append(str(each.get("ctx", {}).get("error", each["msg"])))
            continue
        first = each["loc"][0]
        name = list(fields)[first] if isinstance(first, int) else first
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            sentences.append(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))
        elif each["type"] == "missing":
            sentences.append(f"{name} is missing")
        else:
            reason = each.get("ctx", {}).get("error") if each["type"] == "value_error" else None
            wanted = reason or f"must be {_accepts(fields[name])}"
            sentences.append(f"{spelled.get(name, name)} {wanted}, got {each['input']!r}")
    return "; ".join(dict.fromkeys(sentences))
