"""Settings: strict, located, one line, with a suggestion."""

from __future__ import annotations

import copy
import dataclasses
from typing import Annotated, Any, ClassVar

import pytest

from cupel.errors import SettingsError
from cupel.settings import (
    Budgets,
    DataFile,
    Fraction,
    OneOf,
    PositiveInt,
    canonical,
    digest,
    parse,
    registry,
    settings,
)


@settings
class Square:
    size: PositiveInt = 4
    rgb: tuple[int, int, int] | None = None
    file: DataFile | None = None


@settings
class Mixed:
    alpha: Fraction = 0.1


TRIGGERS = {"square": Square, "mixed": Mixed}


@settings
class Attack:
    trigger: Annotated[Square | Mixed, OneOf(TRIGGERS)]
    lambda_utility: float = 1.0
    epochs: int = 3
    revision: ClassVar[int] = 7


ATTACKS = {"attack": Attack}


@settings
class Exp:
    name: str
    attack: Annotated[Attack, OneOf(ATTACKS)] | None = None
    more: tuple[Annotated[Square | Mixed, OneOf(TRIGGERS)], ...] = ()


GOOD = {
    "name": "x",
    "attack": {"method": "attack", "trigger": {"method": "square", "size": 3, "rgb": [1, 2, 3]}},
    "more": ["square", {"method": "mixed", "alpha": 0.5}],
}


def test_parse_builds_nested_methods():
    made = parse(Exp, GOOD, "e.yaml")
    assert made == Exp(
        name="x", attack=Attack(trigger=Square(size=3, rgb=(1, 2, 3))), more=(Square(), Mixed(alpha=0.5))
    )


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (
            "attack.lamda_utility",
            1,
            (
                "e.yaml.attack[attack]: unknown key 'lamda_utility'; did you mean 'lambda_utility'?"
                " (known: epochs, lambda_utility, trigger)"
            ),
        ),
        ("attack.trigger.size", 10.5, "e.yaml.attack[attack].trigger[square].size: expected int, got 10.5 (float)"),
        ("attack.trigger.size", "no", "e.yaml.attack[attack].trigger[square].size: expected int, got 'no' (str)"),
        (
            "attack.trigger.size",
            -1,
            "e.yaml.attack[attack].trigger[square].size: input should be greater than 0, got -1 (int)",
        ),
        (
            "attack.trigger.method",
            "squar",
            "e.yaml.attack[attack].trigger: unknown method 'squar'; did you mean 'square'? (known: mixed, square)",
        ),
        ("attack", "attack", "e.yaml.attack[attack]: 'trigger' is missing; add `trigger: …`"),
        ("name", 1, "e.yaml.name: expected text, got 1 (int)"),
        ("nmae", "x", "e.yaml: unknown key 'nmae'; did you mean 'name'? (known: attack, more, name)"),
        ("more", "x", "e.yaml.more: expected a list, got 'x' (str)"),
        (
            "more",
            [{"method": "square", "siz": 1}],
            "e.yaml.more[0][square]: unknown key 'siz'; did you mean 'size'? (known: file, rgb, size)",
        ),
    ],
)
def test_mistakes_are_one_located_line(path, value, line):
    plain = copy.deepcopy(GOOD)
    here = plain
    for part in path.split(".")[:-1]:
        here = here[part]
    here[path.split(".")[-1]] = value
    with pytest.raises(SettingsError) as caught:
        parse(Exp, plain, "e.yaml")
    assert str(caught.value) == line
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Square(size=10.5), "Square.size: expected int, got 10.5 (float)"),
        (lambda: Square(sze=1), "Square: unknown key 'sze'; did you mean 'size'? (known: file, rgb, size)"),
        (lambda: Attack(), "Attack: 'trigger' is missing; add `trigger: …`"),
        (lambda: Attack(trigger=3), "Attack.trigger: expected one of square, mixed, got int, got 3 (int)"),
        (lambda: Mixed(alpha=2.0), "Mixed.alpha: input should be less than or equal to 1, got 2.0 (float)"),
    ],
)
def test_python_callers_meet_the_same_checks(make, line):
    with pytest.raises(SettingsError) as caught:
        make()
    assert str(caught.value) == line


def test_canonical_has_defaults_revision_and_file_contents():
    plain = canonical(Attack(trigger=Square(file="a.npz")), lambda name: f"<{name}>")
    assert plain["revision"] == 7
    assert plain["epochs"] == 3
    assert plain["trigger"]["file"] == "sha256:<a.npz>"


def test_key_follows_content_not_name_of_a_file():
    one = canonical(Square(file="a.npz"), lambda name: "same")
    two = canonical(Square(file="b.npz"), lambda name: "same")
    other = canonical(Square(file="a.npz"), lambda name: "other")
    assert digest(one) == digest(two) != digest(other)


def test_key_is_stable():
    assert digest(canonical(Mixed(alpha=0.25), str)) == "c3869426b04d429197bab8d041b7a9bb"


def test_registry_refuses_a_name_claimed_twice(monkeypatch):
    class Entry:
        name, value = "square", "other:Square"

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Entry])
    with pytest.raises(SettingsError, match="claimed twice"):
        registry("triggers", TRIGGERS)


@settings
class Sized(Budgets):
    steps: int = 9
    kind: str = "plain"
    rates: tuple[float, float] = (0.1, 0.2)
    budgets: ClassVar = {"smoke": {"steps": 2, "rates": (0.5, 0.6)}, "standard": {}}

    def alike(self, budget):
        made = self.preset(budget)
        return made if self.kind == "plain" else dataclasses.replace(made, steps=made.steps + 1)


@settings
class Holding:
    method: Annotated[Any, OneOf({"sized": Sized, "mixed": Mixed})]


def test_a_budget_names_what_is_not_said():
    def made(**plain):
        return parse(Holding, {"method": {"method": "sized", **plain}}, "file").method

    assert made(budget="smoke") == Sized(steps=2, rates=(0.5, 0.6))
    assert made(budget="smoke", rates=[0.1, 0.2]) == Sized(steps=2)  # what is said counts, even where it is the default
    assert made(budget="smoke", kind="other") == Sized(steps=3, rates=(0.5, 0.6), kind="other")
    assert made(budget="standard") == made() == Sized()
    with pytest.raises(SettingsError, match="unknown budget 'smok'; choose one of smoke, standard"):
        made(budget="smok")
    with pytest.raises(SettingsError, match="unknown key 'budget'"):  # it has none
        parse(Holding, {"method": {"method": "mixed", "budget": "smoke"}}, "file")
