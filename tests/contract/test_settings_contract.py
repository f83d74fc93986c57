"""Every method: its settings survive YAML, are frozen and strict, and all of them are in the cache key."""

import dataclasses
import json
import typing
from typing import Any

import pytest

from cupel.errors import SettingsError
from cupel.settings import OneOf, canonical, digest, method_name, parse
from tables import METHODS, TABLES, tiny

PRESETS = ("smoke", "standard", "paper")


def leaves(hint: Any) -> list[Any]:
    inner = [*typing.get_args(hint), *getattr(hint, "__metadata__", ())]
    return [leaf for one in inner for leaf in leaves(one)] if inner else [hint]


def plain(value: Any) -> Any:
    """Settings as a YAML file would hold them."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if not dataclasses.is_dataclass(value):
        return value
    hints = typing.get_type_hints(type(value), include_extras=True)
    made = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        made[field.name] = plain(inner)
        for table in (leaf.table for leaf in leaves(hints[field.name]) if isinstance(leaf, OneOf)):
            if type(inner) in table.values():
                made[field.name]["method"] = method_name(inner, table)
    return made


def key(method: Any) -> str:
    return digest(canonical(method, lambda path: "content of " + path))


def variants(cls: Any) -> list[Any]:
    budgeted = hasattr(cls, "scan") or hasattr(cls, "purify") or cls in TABLES["certifiers"].values()
    presets = [cls.preset(name) for name in PRESETS] if budgeted else []
    return [cls(), tiny(cls), *presets]


@pytest.mark.parametrize(("stage", "name", "cls"), METHODS)
def test_round_trip(stage: str, name: str, cls: Any) -> None:
    for method in variants(cls):
        again = parse(cls, json.loads(json.dumps(plain(method))), "test")
        assert again == method
        assert key(again) == key(method)


@pytest.mark.parametrize(("stage", "name", "cls"), METHODS)
def test_frozen_and_strict(stage: str, name: str, cls: Any) -> None:
    method = cls()
    first = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, first, getattr(method, first))
    misspelt = first[:-1] + first[-1] * 2
    with pytest.raises(SettingsError, match=f"unknown key '{misspelt}'; did you mean '{first}'") as caught:
        parse(cls, {misspelt: 1}, "exp.yaml")
    assert "\n" not in str(caught.value)
    for field in dataclasses.fields(cls):
        if type(field.default) is int:
            with pytest.raises(SettingsError, match=field.name):
                cls(**{field.name: field.default + 0.5})


def changed(value: Any) -> list[Any]:
    """Other values that a field may hold; the first that is in its range will do."""
    if isinstance(value, bool):
        return [not value]
    others = {int: [1, 2], float: [0.25, -0.25, 1e-3, -1e-3]}.get(type(value), [])
    return [value + other for other in others]


@pytest.mark.parametrize(("stage", "name", "cls"), METHODS)
def test_every_number_is_in_the_key(stage: str, name: str, cls: Any) -> None:
    method = cls()
    assert key(method) == key(cls())
    for field in dataclasses.fields(cls):
        for value in changed(getattr(method, field.name)):
            try:
                other = dataclasses.replace(method, **{field.name: value})
            except SettingsError:
                continue
            assert key(other) != key(method), field.name
            break


@pytest.mark.parametrize(("stage", "name", "cls"), METHODS)
def test_revision_is_in_the_key(stage: str, name: str, cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(cls())
    monkeypatch.setattr(cls, "revision", cls.revision + 1)
    assert key(cls()) != before


@pytest.mark.parametrize(("stage", "name", "cls"), METHODS)
def test_key_is_made_of_plain_values(stage: str, name: str, cls: Any) -> None:
    """What JSON cannot say, a set or an object, would get another key in another process."""
    for method in variants(cls):
        values = canonical(method, str)
        assert json.loads(json.dumps(values, allow_nan=False)) == values
