"""Purifiers over a zoo: goals counted by hand, and a tiny zoo purified."""

from __future__ import annotations

import copy
import json

import pytest
import yaml

from cupel.errors import DataError, SettingsError, UsageError
from cupel.records import Record
from cupel.zoo.command import zoo_build, zoo_table
from cupel.zoo.cures import Cure, Values, read_cures, summaries
from cupel.zoo.file import read_zoo
from cupel.zoo.purifying import purify_members, purify_steps
from cupel.zoo.render_cures import render_cures

GIVEN, TWIN = Values(0.80, 1.0, 0.1, 0.98, 0.8), Values(0.82, 0.04, 0.80, 0.20, 0.8)


def cure(name="e", given=GIVEN, area=0.05, family="patch", zoo="z", **purified):
    return Cure(name, zoo, family, "test", area, given, TWIN, purified)


@pytest.mark.parametrize(
    ("values", "goals"),
    [
        (Values(0.78, 0.09, 0.72, 0.30), (True, True, True)),  # each on its line
        (Values(0.779, 0.09, 0.719, 0.301), (False, False, False)),
        (Values(0.90, 0.091, 0.72, 0.0), (False, True, True)),  # accuracy alone is no cure
        (Values(0.78, 0.09, 0.72), (True, True, None)),
    ],
)
def test_goals_are_met_at_their_lines(values, goals):
    one = cure(cbd=values)
    assert (one.removed("cbd"), one.robust("cbd"), one.lasting("cbd")) == goals


def test_summaries_count_working_backdoors_alone():
    good, bad = (
        Values(0.80, 0.05, 0.80, 0.2, seconds=4.0, old_accuracy=0.7, old_asr=0.1, forward=1200.0),
        Values(0.60, 0.90, 0.20, 0.9, seconds=6.0),
    )
    asleep = cure("asleep", Values(0.8, 0.3, 0.5), cbd=good)
    cures = [cure("a", cbd=good, ft=bad), cure("b", cbd=bad, area=0.09), cure("c", cbd=good, zoo="y"), asleep]
    found = {(one.group, one.purifier): one for one in summaries(cures)}
    whole = found["all", "cbd"]
    assert (whole.encoders, whole.removed, whole.robust, whole.lasting, whole.measured) == (3, 2, 2, 2, 3)
    assert whole.means["accuracy"][0] == pytest.approx((0.8 + 0.6 + 0.8) / 3)
    assert whole.means["asr"][1] is not None
    assert whole.means["seconds"][0] == pytest.approx(14 / 3)
    assert found["all", "ft"].encoders == 1
    assert found["all", "ft"].means["asr"] == (0.9, None, None)
    assert found["zoo:y", "cbd"].removed == 1
    assert found["large patches", "cbd"].removed == 0
    text = render_cures(cures, list(found.values()), [("d", "purify cbd: says no")])
    assert "| cbd      | all patches and blends that work | 3 | 2 of 3  | 2 of 3 | 2 of 3  |" in text
    assert "| cbd | 3 | 70.0 | 10.0 | 5 | 1,200 | – | – |" in " ".join(text.split())
    assert "- d: purify cbd: says no" in text
    assert render_cures([], [], []) == ""


ENCODER = {"method": "fast", "input_size": 16, "width": 4}
ATTACK = {"method": "badencoder", "steps": 3, "batch_size": 16, "l1_draws": 2}
ZOO = {
    "name": "zoo-tiny",
    "base": {
        "upstream": {
            "data": "digits", "size": 200, "encoder": ENCODER,
            "objective": {"method": "simclr", "steps": 4, "batch_size": 32},
        },
        "downstream": {"data": "digits", "head_seeds": 1, "size": 150, "test_size": 60},
        "defender": {"size": 80},
        "attacker": {"shadow": {"size": 64}},
    },
    "scan": [{"method": "decree", "steps": 3, "batch_size": 8, "num_seeds": 2, "success": 0.01, "precision": "fp32"}],
    "purify": {
        "methods": {
            "short": {"method": "cbd", "steps": 2, "batch_size": 16},
            "impossible": {"method": "cbd", "steps": 2, "batch_size": 500},
            "labelled": {"method": "lp", "steps": 2, "batch_size": 16},
        },
        "evidence": [], "labelled": 40, "head_seeds": 1, "retuning": {"least": 20, "seeds": 1},
    },
    "families": {
        "clean": {"calibration": {"seed": [1]}, "test": {"seed": [11]}},
        "patch": {
            "changes": {"attack": ATTACK, "downstream.target_class": 1},
            "calibration": {"look": {"white": {"seed": 1, "attack.trigger": {"method": "patch", "size": 4}}}},
            "test": {"look": {"red": {"seed": 11, "attack.trigger": {"method": "patch", "size": 4, "color": "red"}}}},
        },
    },
}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "zoo-tiny.yaml"
    path.write_text(yaml.safe_dump(ZOO))
    return path


@pytest.mark.full
def test_a_zoo_is_purified(tmp_path, source, capsys):
    zoo, out = read_zoo(source), tmp_path / "zoo"
    assert purify_members(zoo, out).left == 1  # nothing is made by purifying
    zoo_build(str(source), out, "clean", None, False)
    zoo_build(str(source), out, "attacked", None, False)
    made = purify_members(zoo, out)
    assert [one.name for one in made.failed] == ["patch-test--look=red"]  # of the test half alone
    assert len(made.failed[0].notes) == 1
    assert "500" in made.failed[0].notes[0]
    (one,), failed = read_cures([out])
    assert set(one.purified) == {"short", "labelled"}
    assert all(v.retuned is not None and v.seconds is not None and v.to_twin for v in one.purified.values())
    assert all(
        v.old_accuracy is not None and v.forward and v.backward is not None and v.memory for v in one.purified.values()
    )
    assert one.given.retuned is None
    assert one.twin.retuned is not None
    assert [name for name, _ in failed] == [one.name]
    capsys.readouterr()
    assert zoo_table([out], None, "md") == 0
    assert "every encoder" in capsys.readouterr().out
    assert json.loads((out / "zoo.json").read_text())["purified"][0]["purified"]["short"]["accuracy"] >= 0
    plain = copy.deepcopy(ZOO)
    del plain["purify"]["methods"]["impossible"]
    source.write_text(yaml.safe_dump(plain))
    again = purify_members(read_zoo(source), out)  # what it has in common with the other file is there
    assert (again.done + again.stored, len(again.failed)) == (1, 0)
    del plain["purify"]
    source.write_text(yaml.safe_dump(plain))
    bare = read_zoo(source)
    with pytest.raises(UsageError, match="names no purifiers"):
        purify_members(bare, out)


def test_purifiers_get_the_inverted_triggers_that_are_named(tmp_path, source):
    plain = copy.deepcopy(ZOO)
    name = read_zoo(source).scanner_names[0]
    plain["purify"]["evidence"] = [name]
    source.write_text(yaml.safe_dump(plain))
    zoo = read_zoo(source)
    steps = purify_steps(next(one for one in zoo.members if one.backdoored), zoo)
    (scan,) = [one for one in steps if one.stage == "scan"]
    assert all(scan in one.inputs for one in steps if one.stage == "purify")
    plain["purify"]["evidence"] = ["decree/smoke"]
    source.write_text(yaml.safe_dump(plain))
    with pytest.raises(SettingsError, match="'decree/smoke' is not a scanner"):
        read_zoo(source)


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / "members.json").write_text(json.dumps({"members": ["x"], "scanners": [], "chain": []}))
    record = Record("zoo", "x", "0", 0, "cpu", 1, extra={"zoo": {"purified": {}}})
    record.write(tmp_path / "purified" / "x.json")
    with pytest.raises(DataError, match="damaged record of purifiers"):
        read_cures([tmp_path])
