"""Zoo files: families become experiments, and nothing crosses the halves."""

from __future__ import annotations

import copy
import sys

import pytest
import yaml

from cupel.errors import DataError, SettingsError
from cupel.experiment import packaged
from cupel.scan import Decree
from cupel.settings import settings
from cupel.triggers import TRIGGERS, Blend, Checker, Patch, RandomPatch
from cupel.verdicts import Reference
from cupel.zoo.file import check_halves, packaged_zoos, read_zoo, trigger_of
from cupel.zoo.looks import look_of, overlap
from cupel.zoo.making import steps_of
from cupel.zoo.parts import HALVES

ATTACK = {"method": "badencoder", "steps": 4, "batch_size": 32, "l1_draws": 2}
ZOO = {
    "name": "zoo-tiny",
    "base": {
        "upstream": {
            "data": "digits",
            "size": 400,
            "encoder": {"method": "fast", "input_size": 16, "width": 8},
            "objective": {"method": "simclr", "steps": 4, "batch_size": 32},
        },
        "downstream": {"data": "digits", "head_seeds": 1},
        "defender": {"size": 64},
    },
    "scan": [{"method": "decree", "steps": 4, "batch_size": 8, "num_seeds": 2}],
    "families": {
        "clean": {"calibration": {"seed": [1, 2]}, "test": {"seed": [11, 12]}},
        "tuned": {
            "changes": {"attack": {**ATTACK, "lambda_trigger": 0.0}, "downstream.target_class": 1},
            "calibration": {"seed": [1]},
            "test": {"seed": [11]},
        },
        "patch": {
            "changes": {"attack": ATTACK, "downstream.target_class": 1},
            "calibration": {"look": {"white": {"seed": 1, "attack.trigger": {"method": "patch", "size": 4}}}},
            "test": {
                "look": {"red": {"seed": 11, "attack.trigger": {"method": "patch", "size": 4, "color": "red"}}}
            },
        },
    },
}  # fmt: skip


def written(tmp_path, zoo=ZOO, **changes):
    plain = copy.deepcopy(zoo)
    for path, value in changes.items():
        here = plain
        *parts, last = path.split("__")
        for part in parts:
            here = here[part]
        here[last] = value
    path = tmp_path / "zoo-tiny.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def test_families_become_members_clean_ones_first_the_halves_in_turns(tmp_path):
    zoo = read_zoo(written(tmp_path))
    assert [(one.family, one.half, one.experiment.seed) for one in zoo.members] == [
        ("clean", "calibration", 1), ("clean", "test", 11), ("clean", "calibration", 2), ("clean", "test", 12),
        ("tuned", "calibration", 1), ("tuned", "test", 11),
        ("patch", "calibration", 1), ("patch", "test", 11),
    ]  # fmt: skip
    assert [one.backdoored for one in zoo.members] == [False] * 6 + [True] * 2
    assert [one.attacked for one in zoo.members] == [False] * 4 + [True] * 4
    assert zoo.chain == (Decree(steps=4, batch_size=8, num_seeds=2).name,)
    assert trigger_of(zoo.members[5]) is None
    assert trigger_of(zoo.members[7]) == Patch(size=4, color="red")


def test_clean_pre_training_is_shared_and_scans_do_not_depend_on_what_ships(tmp_path, monkeypatch):
    zoo = read_zoo(written(tmp_path))
    before = [steps_of(one, zoo) for one in zoo.members]
    pretrained = [next(s.key for s in steps.make if s.stage == "pretrain") for steps in before]
    assert pretrained[0] == pretrained[4] == pretrained[6]
    assert len(set(pretrained)) == 4
    assert len({steps.encoder.key for steps in before}) == len(zoo.members)
    assert all(steps.scan[0].inputs[0].key == steps.encoder.key for steps in before)
    shipped = Reference(zoo.chain[0], "any", (0.1,) * 6)
    monkeypatch.setattr(sys.modules["cupel.experiment.plan"], "shipped_reference", lambda *_: shipped)
    after = [steps_of(one, zoo) for one in zoo.members]
    assert [s.key for steps in after for s in steps.scan] == [s.key for steps in before for s in steps.scan]
    assert all(s.method["reference"] is None for steps in after for s in steps.scan)


def test_a_dear_scanner_is_given_a_sample_of_the_test_half(tmp_path):
    families = {**ZOO["families"], "clean": {"calibration": {"seed": [1]}, "test": {"seed": [11, 12, 13, 14]}}}
    sample = {"scan": [{"method": "decree", "steps": 9}], "size": 2}
    zoo = read_zoo(written(tmp_path, families=families, sample=sample))
    assert zoo.scanner_names == (zoo.scanners[0].name, Decree(steps=9).name)
    assert zoo.chain == zoo.scanner_names[:1]
    given = {one.name: len(steps_of(one, zoo).scan) for one in zoo.members}
    chosen = [one for one in zoo.members if given[one.name] == 2]
    assert {one.half for one in chosen} == {"test"}
    assert [one.backdoored for one in chosen] == [False, False, True]  # only one is backdoored
    assert chosen[0].experiment.seed == 11
    assert sum(given.values()) == len(zoo.members) + 3


WHITE = {"method": "patch", "size": 4, "color": [255, 255, 255], "corner": "top_left"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"families__clean__test": {"seed": [2, 12]}}, "use one seed, but are in different halves"),
        ({"families__patch__test__look__red__seed": 1}, "use one seed"),
        (
            {"families__patch__test__look__red__attack.trigger": {"method": "patch", "size": 4}},
            "stamp the same trigger",
        ),
        ({"families__patch__test__look__red__attack.trigger": WHITE}, "stamp the same trigger"),
        ({"families__tuned__test": None, "families__tuned__calibration": None}, "has no members"),
        ({"families__clean__calibration": {"seed": [1, 1]}}, "is there twice"),
        ({"chain": ["decree/smoke"]}, "is not among the scanners"),
        ({"scan": []}, "is empty"),
        ({"sample": {"scan": ["decree", "decree"]}}, "names one scanner twice"),
        ({"sample": {"scan": []}}, "sample: tuple should have at least 1 item"),
        ({"scan": ["decree", "decree"]}, "names one scanner twice"),
        ({"families__patch__hrd": True}, "unknown key 'hrd'; did you mean 'hard'"),
        ({"base__purify": ["cbd"]}, "scanners or purifiers"),
        ({"purify": {"methods": {"twin": "cbd"}, "evidence": []}}, "'twin' is the row of an encoder itself"),
        ({"base__sed": 3}, "unknown key 'sed'"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, changes, line):
    with pytest.raises(SettingsError, match=line) as caught:
        read_zoo(written(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_no_scanner_carries_a_stamp_of_the_test_half(tmp_path):
    @settings
    class Dictionary:
        stamps: tuple = (Patch(size=40), Patch(size=4, color=(255, 0, 0), corner="top_left"))
        name = "dictionary/smoke"

    members = read_zoo(written(tmp_path)).members
    with pytest.raises(SettingsError, match="dictionary/smoke carries the trigger of patch-test--look=red"):
        check_halves(members, [Dictionary()], "zoo")
    check_halves(members, [Dictionary(stamps=(Patch(size=4), Patch(size=5, color="red")))], "zoo")


def test_unknown_zoo_is_suggested():
    with pytest.raises(DataError, match="did you mean 'zoo-digits'"):
        read_zoo("zoo-digit")


@pytest.mark.parametrize("name", packaged_zoos())
def test_packaged_zoos_cross_nothing(name):
    zoo = read_zoo(name)  # which checks seeds and looks
    assert zoo.name == name
    halves = {half: [one for one in zoo.members if one.half == half] for half in HALVES}
    first, second = ({one.experiment.seed for one in members} for members in halves.values())
    assert not first & second
    assert not (first | second) & set(range(1000, 1100)), "seeds of other calibrations"
    looks = [
        {look_of(t, one.experiment.upstream.encoder.input_size).digest for one in members if (t := trigger_of(one))}
        for members in halves.values()
    ]
    assert all(looks)
    assert not looks[0] & looks[1]
    for members in halves.values():
        recipes = [repr(one.experiment.upstream) for one in members if not one.attacked]
        assert max(recipes.count(one) for one in recipes) >= 5, "enough for a calibration of one recipe"


def test_packaged_zoos_are_large_enough_and_are_no_experiments():
    members = [one for name in ("zoo-shapes", "zoo-cifar10") for one in read_zoo(name).members]
    assert sum(not one.backdoored for one in members) >= 60
    for half in HALVES:
        assert sum(one.backdoored for one in members if one.half == half) >= 24
        areas = [
            look.area
            for one in members
            if one.half == half and (t := trigger_of(one)) and (look := look_of(t, 32)).area < 0.5
        ]
        assert min(areas) < 0.03
        assert max(areas) > 0.09
    objectives = {type(one.experiment.upstream.objective).__name__ for one in members if not one.attacked}
    assert {"SimCLR", "MoCo", "BYOL", "SimSiam", "BarlowTwins", "Supervised"} <= objectives
    assert len({one.experiment.upstream.encoder.width for one in members}) >= 3
    assert not set(packaged_zoos()) & set(packaged())


@pytest.mark.parametrize(("name", "cls"), [pytest.param(n, c, id=n) for n, c in TRIGGERS.items()])
def test_every_trigger_has_a_look(name, cls):
    look = look_of(cls() if name != "patch" else cls(size=5), 32)
    assert 0 < look.area <= 1
    assert look.mask.mean() == pytest.approx(look.area)


def test_look_is_what_is_seen():
    assert look_of(Patch(size=4), 16).area == 16 / 256
    assert look_of(Patch(size=4, color="black"), 16).digest != look_of(Patch(size=4), 16).digest
    assert look_of(Patch(size=4, color=(128, 128, 128)), 16).area == 16 / 256  # grey on grey
    assert look_of(Blend(alpha=0.2), 16).area > 0.9
    assert look_of(Blend(pattern_seed=1), 16).digest != look_of(Blend(pattern_seed=2), 16).digest
    wide, narrow = RandomPatch(size=4, low=0.1, high=0.9), RandomPatch(size=4)
    assert look_of(wide, 32).digest == look_of(narrow, 32).digest  # the same picture at other places
    assert not look_of(wide, 32).fixed
    assert look_of(Checker(), 32).fixed


def test_overlap_of_masks():
    true = look_of(Patch(size=4, margin=0), 16).mask
    exact = overlap(true.astype("float32"), true)
    assert exact is not None
    assert (exact.iou, exact.distance) == (1.0, 0.0)
    moved = overlap(look_of(Patch(size=4, margin=0, corner="bottom_left"), 16).mask.astype("float32"), true)
    assert moved is not None
    assert (moved.iou, moved.distance) == (0.0, 12 / 16)
    assert overlap(0 * true.astype("float32"), true) is None


def test_a_folder_does_not_hide_a_packaged_zoo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo-digits").mkdir()
    assert read_zoo("zoo-digits").name == "zoo-digits"
