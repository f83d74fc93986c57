"""Settings: frozen dataclasses, declared once, checked by pydantic, and turned into one-line errors and cache keys."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from cupel.errors import SettingsError, UsageError, did_you_mean

__all__ = [
    "STRICT",
    "Budgets",
    "DataFile",
    "Fraction",
    "OneOf",
    "Positive",
    "PositiveInt",
    "canonical",
    "digest",
    "field_table",
    "method_name",
    "parse",
    "registry",
    "settings",
]

STRICT = ConfigDict(extra="forbid", strict=True)
T = TypeVar("T")

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class _ContentCounts:
    """Marks a setting that names a file: the SHA-256 of its content enters the cache key, not its path."""


DataFile = Annotated[str, _ContentCounts()]


class Budgets:
    """Base of settings that have names for how much may be spent.

    Attributes:
        budgets: Settings by budget (`smoke`, `standard`, `paper`); what is not named has its default.
    """

    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"smoke": {}, "standard": {}, "paper": {}}

    @classmethod
    def preset(cls, budget: str) -> Self:
        """Settings of a budget: `smoke` (seconds on a small encoder), `standard` or `paper`.

        Raises:
            UsageError: no such budget.
        """
        if budget not in cls.budgets:
            raise UsageError("budget", f"unknown '{budget}'", did_you_mean(budget, cls.budgets))
        return cls(**cls.budgets[budget])

    def alike(self, budget: str) -> Self:
        """The settings of a budget for the same kind of method; kinds exist where a method says so."""
        return self.preset(budget)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, strictly validated dataclass.

    YAML and Python callers meet the same checks: unknown keys, wrong types and values out of range are
    `SettingsError`s; nothing is coerced at a loss.
    """
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    checked_init = made.__init__

    @functools.wraps(checked_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            checked_init(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise reworded(error, cls.__name__, made) from None

    typing.cast("Any", made).__init__ = init  # pydantic's own errors take several lines
    return typing.cast("type[T]", made)


def registry(stage: str, own: Mapping[str, type]) -> dict[str, type]:
    """The table of a stage: our methods and those that other packages announce as entry points `cupel.<stage>`.

    Raises:
        SettingsError: two methods claim one name.
    """
    table = dict(own)
    for entry in importlib.metadata.entry_points(group=f"cupel.{stage}"):
        if entry.name in table:
            raise SettingsError(f"cupel.{stage}", f"the name '{entry.name}' is claimed twice ({entry.value})")
        table[entry.name] = entry.load()
    return table


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Annotation of a field that holds a method of a table: `Annotated[Trigger, OneOf(TRIGGERS)]`.

    In YAML the method is a mapping with the key `method`, or the bare name when all defaults are meant;
    in Python it is an instance of one of the table's classes. The key `budget` names the settings that hold
    where the mapping says nothing else, for methods that have budgets.
    """

    table: Mapping[str, type]

    def __hash__(self) -> int:
        return id(self.table)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices: dict[Any, CoreSchema] = {
            name: core_schema.no_info_plain_validator_function(functools.partial(_from_plain, cls))
            for name, cls in self.table.items()
        }
        tagged = core_schema.no_info_before_validator_function(
            _with_method, core_schema.tagged_union_schema(choices, discriminator="method")
        )
        classes = tuple(self.table.values())

        def instance(value: Any) -> Any:
            if not isinstance(value, classes):
                raise ValueError(f"expected one of {', '.join(self.table)}, got {type(value).__name__}")
            return value

        python = core_schema.no_info_plain_validator_function(instance)
        return core_schema.json_or_python_schema(json_schema=tagged, python_schema=python)


def _with_method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


def _from_plain(cls: type, value: Any) -> Any:
    given = {k: v for k, v in value.items() if k != "method"}
    budget = given.pop("budget", None) if issubclass(cls, Budgets) else None
    # through JSON again: in pydantic's strict Python mode a list is no tuple
    made: Any = TypeAdapter(cls).validate_json(json.dumps(given))
    if budget is None:
        return made
    if budget not in made.budgets:
        raise ValueError(f"unknown budget '{budget}'; choose one of {', '.join(made.budgets)}")
    return dataclasses.replace(made.alike(budget), **{name: getattr(made, name) for name in given})


def parse(cls: type[T], data: Any, where: str) -> T:
    """Build settings from what a YAML or JSON file held.

    Args:
        cls: A settings class.
        data: Plain mapping, as `yaml.safe_load` returns it.
        where: Name of the file, for errors.

    Raises:
        SettingsError: one line per mistake is too many for a terminal, so the first is shown and the rest counted.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(data))
    except pydantic.ValidationError as error:
        raise reworded(error, where, cls) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingsError(where, f"holds a value that is neither text, number, list nor mapping ({error})") from None


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def reworded(error: pydantic.ValidationError, where: str, cls: type) -> SettingsError:
    """Pydantic's first error as one line: path with the methods' names in brackets, what, what to do."""
    errors = error.errors(include_url=False, include_context=True)
    # a misspelt key is reported twice, as unknown and as missing: the unknown one tells more
    first = min(errors, key=lambda one: one["type"] not in _UNKNOWN)
    kind, given, context = first["type"], first.get("input"), first.get("ctx", {})
    unknown = kind in _UNKNOWN
    missing = kind in ("missing", "missing_argument", "missing_keyword_only_argument")
    place, known = _locate(cls, first["loc"][:-1] if unknown or missing else first["loc"])
    where = where + place
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    last = str(first["loc"][-1]) if first["loc"] else ""
    if unknown:
        return SettingsError(where, f"unknown key '{last}'", did_you_mean(last, known) + more)
    if missing:
        return SettingsError(where, f"'{last}' is missing", f"add `{last}: …`" + more)
    if kind == "union_tag_invalid":
        tag, tags = str(context["tag"]), [t.strip("'") for t in str(context["expected_tags"]).split(", ")]
        return SettingsError(where, f"unknown method '{tag}'", did_you_mean(tag, tags) + more)
    if kind == "union_tag_not_found":
        todo = "write the method's name, or a mapping with the key `method`"
        return SettingsError(where, "names no method", todo + more)
    message = {
        "int_type": "expected int", "int_from_float": "expected int", "float_type": "expected a number",
        "string_type": "expected text", "bool_type": "expected true or false", "list_type": "expected a list",
        "tuple_type": "expected a list", "dataclass_type": "expected a mapping",
    }.get(kind)  # fmt: skip
    if message is None:
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
    return SettingsError(where, f"{message}, got {given!r} ({type(given).__name__}){more}")


def _locate(cls: type, loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """`('attack', 'badencoder', 'lr')` → `.attack[badencoder].lr`, and the field names known at that place."""
    text, here = "", cls
    parts = list(loc)
    while parts:
        part = parts.pop(0)
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        table = _table_at(here)
        if table is not None and part in table:
            text, here = f"{text}[{part}]", table[part]
            continue
        hints = typing.get_type_hints(here, include_extras=True) if dataclasses.is_dataclass(here) else {}
        if part not in hints:
            break  # one of pydantic's own tags
        text, here = f"{text}.{part}", hints[part]
    names = [f.name for f in dataclasses.fields(here)] if dataclasses.is_dataclass(here) else []
    return text, names


def _table_at(hint: Any) -> Mapping[str, type] | None:
    for one in _leaves(hint):
        if isinstance(one, OneOf):
            return one.table
    return None


def _leaves(hint: Any) -> list[Any]:
    """Every type and annotation inside a hint: `list[Annotated[X, OneOf(T)]] | None` → X, OneOf(T), None."""
    if typing.get_origin(hint) is None:
        return [hint]
    inner = [*typing.get_args(hint), *getattr(hint, "__metadata__", ())]
    return [leaf for one in inner for leaf in _leaves(one)]


def method_name(value: object, table: Mapping[str, type]) -> str:
    """The registered name of a method object."""
    return next(name for name, cls in table.items() if type(value) is cls)


def canonical(value: Any, content: Callable[[str], str]) -> Any:
    """Settings as plain JSON values with every default, the class's `revision`, and files by their content.

    Args:
        value: Settings object, or anything inside one.
        content: Gives the SHA-256 of a file that settings name.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value), include_extras=True)
        plain = {"class": type(value).__name__, "revision": getattr(type(value), "revision", 1)}
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if isinstance(inner, str) and any(isinstance(leaf, _ContentCounts) for leaf in _leaves(hints[field.name])):
                inner = "sha256:" + content(inner)
            plain[field.name] = canonical(inner, content)
        return plain
    if isinstance(value, list | tuple):
        return [canonical(one, content) for one in value]
    if isinstance(value, dict):
        return {str(k): canonical(v, content) for k, v in value.items()}
    return value


def digest(plain: Any) -> str:
    """Short content hash of plain JSON values (128 bits, hexadecimal)."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def field_table(cls: type) -> list[tuple[str, str, str]]:
    """Name, type and default of every setting of a method, for `cupel show` and the docs."""
    rows = []
    for field in dataclasses.fields(cls):
        hint = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = str(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = str(field.default_factory())
        rows.append((field.name, hint, default))
    return rows
