"""Every method: its settings survive YAML, are frozen and strict, and all of them are in the cache key."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from cupel.errors import SettingsError
from cupel.settings import OneOf, canonical, digest, method_name, parse
from tables import METHODS, tiny

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
    presets = [cls.preset(name) for name in PRESETS] if hasattr(cls, "scan") or hasattr(cls, "purify") else []
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
    if isinstance(value, int):
        return [value + 1, value * 2]
    if isinstance(value, float):
        return [value * 1.5, value * 0.5, value + 0.25]
    return []


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


def test_keys_are_the_same_in_another_process() -> None:
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from tables import METHODS\n"
        "from cupel.settings import canonical, digest\n"
        "print(json.dumps({m.id: digest(canonical(m.values[2](), str)) for m in METHODS}))"
    )
    here = {m.id: digest(canonical(m.values[2](), str)) for m in METHODS}
    tests = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code, tests], capture_output=True, text=True, check=True, env=environment
    )
    assert json.loads(done.stdout) == here
