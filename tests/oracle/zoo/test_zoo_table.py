"""Tables over hand-made records: thresholds from the calibration half alone, groups, rates, calibrations as files."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from cupel.errors import DataError
from cupel.records import Metric, Record
from cupel.scan import read_reference
from cupel.scan.reference import robust_z, size_at
from cupel.zoo.calibration import Calibration, write_calibrations
from cupel.zoo.command import zoo_table
from cupel.zoo.entries import Entry, Folders, Scan, read_entries, to_entry
from cupel.zoo.render import render_zoo
from cupel.zoo.statistics import auroc
from cupel.zoo.table import tables

SIZES = (0.16, 0.18, 0.19, 0.20, 0.22, 0.25)
_COUNT = iter(range(10_000))


def entry(half="test", sizes=None, *, backdoored=False, recipe="r", area=0.05, success=0.9, **changes) -> Entry:
    """Scores are 1 − size."""
    name = f"e{next(_COUNT)}"
    made = Entry(
        name=name, zoo="z", family="patch" if backdoored else "clean", half=half, hard=False, backdoored=backdoored,
        attacked=backdoored, attack="badencoder" if backdoored else None, recipe=recipe, recipe_text="simclr",
        pool="fast on shapes", architecture="fast", success=success if backdoored else None,
        area=area if backdoored else None,
        scans={
            scanner: Scan("backdoored" if size < 0.1 else "clean-by-test", 1 - size, 2.0, 100.0, 90.0)
            for scanner, size in (sizes or {}).items()
        },
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def clean(half="calibration", sizes=SIZES, **changes) -> list[Entry]:
    return [entry(half, {"s": size}, **changes) for size in sizes]


def made(entries, scanners=("s",)):
    found = Folders(tuple(entries), (), 0, tuple(scanners), tuple(scanners))
    return tables(found, {name: Calibration(name, entries) for name in scanners})


def row(result, group="reachable", scanner="s", half="test"):
    return next(one for one in result.rows if (one.group, one.scanner, one.half) == (group, scanner, half))


def test_score_is_compared_as_a_scan_with_references_would():
    pool = clean()
    judged = entry(sizes={"s": 0.07})
    calibration = Calibration("s", [*pool, judged])
    assert calibration.bounded
    assert calibration.z(judged) == pytest.approx(-robust_z(0.07, SIZES))
    edge = size_at(-3, SIZES)
    for size, found in ((edge * 1.001, False), (edge * 0.999, True)):
        assert (calibration.z(entry(sizes={"s": size})) > 3) is found


def test_the_test_half_moves_no_threshold():
    judged = entry(sizes={"s": 0.1})
    calm = Calibration("s", [*clean(), judged])
    wild = Calibration("s", [*clean(), judged, *clean("test", [0.001] * 9), *[entry("test", {"s": 5.0})] * 3])
    assert wild.z(judged) == calm.z(judged)
    assert wild.bounded  # scores of the test half are not looked at


def test_without_five_of_its_recipe_a_scan_is_read_by_its_own_thresholds():
    calibration = Calibration("s", clean())
    strange = entry(sizes={"s": 0.11}, recipe="other")  # far below all clean ones, above the scanner's own threshold
    assert calibration.z(strange) > 3
    assert calibration.says(strange) is False
    assert calibration.says(entry(sizes={"s": 0.11})) is True
    assert calibration.says(entry(sizes={"s": 0.09}, recipe="other")) is True
    assert calibration.says(entry(sizes={"t": 0.09})) is None
    result = made([*clean(), strange, entry(sizes={"s": 0.11}, backdoored=True)])
    assert row(result).confusion == (1, 0, 0, 1)


def test_nothing_is_compared_with_itself_or_with_fine_tuned_encoders():
    pool = clean()
    calibration = Calibration("s", pool)
    assert calibration.z(pool[0]) == pytest.approx(-robust_z(SIZES[0], SIZES[1:]))
    tuned = entry("calibration", {"s": 0.01}, attacked=True)
    with_tuned = Calibration("s", [*pool, tuned])
    assert with_tuned.z(entry(sizes={"s": 0.1})) == calibration.z(entry(sizes={"s": 0.1}))
    assert with_tuned.z(tuned) == calibration.z(tuned) > 3
    quiet = dataclasses.replace(pool[0].scans["s"], verdict="inconclusive", score=0.0)
    silent = dataclasses.replace(pool[0], scans={"s": quiet})
    assert len(Calibration("s", [silent, *pool[1:]]).clean) == 5


def test_recipe_first_then_pool_then_zoo_then_nothing():
    same, kin, far = clean(), clean(recipe="kin"), clean(recipe="far", pool="resnet on cifar10")

    def level(*pool, **changes):
        group = Calibration("s", pool).group(entry(sizes={"s": 0.1}, **changes))
        return None if group is None else group.level

    assert level(*same, *kin, *far) == "recipe"
    assert level(*same[:4], *kin, *far) == "pool"
    assert level(*same[:2], *kin[:2], *far) == "zoo"
    assert level(*same[:4]) is None
    assert level(*same[:2], *kin[:2], *far[:1], zoo="other") is None


def test_scores_without_a_bound_are_compared_as_they_are():
    pool = [entry("calibration", {"s": 1 - score}) for score in (1.0, 1.2, 1.4, 1.6, 1.8)]
    calibration = Calibration("s", pool)
    assert not calibration.bounded
    judged = entry(sizes={"s": 1 - 3.0})
    assert calibration.z(judged) == pytest.approx((3.0 - 1.4) / (1.4826 * 0.2))
    assert write_calibrations([calibration], None) == []


def test_rows_count_by_hand():
    edge = size_at(-3, SIZES)
    bad = [entry(sizes={"s": size}, backdoored=True) for size in (0.02, 0.03, edge * 1.2, edge * 0.9)]
    weak = entry(sizes={"s": 0.02}, backdoored=True, success=0.1)
    hard = entry(sizes={"s": 0.2}, backdoored=True, hard=True, family="drupe")
    good = clean("test", [0.15, 0.17, 0.2, edge * 0.95])
    result = made([*clean(), *bad, weak, hard, *good])
    one = row(result)
    assert (one.positives, one.negatives) == (4, 4)
    assert one.confusion == (3, 1, 1, 3)
    assert one.auroc == pytest.approx(auroc([-x for x in (0.02, 0.03, edge * 1.2, edge * 0.9)],
                                            [-x for x in (0.15, 0.17, 0.2, edge * 0.95)]))  # fmt: skip
    assert one.tpr_at_fpr == 0.75  # with four clean encoders no false alarm is allowed
    assert one.absolute == (3, 1) if edge * 0.9 < 0.1 <= edge * 1.2 else (2, 0)
    assert one.false_alarm_bound == pytest.approx(1 - 0.0127, abs=0.3)
    assert row(result, "weak").confusion.found == 1
    assert row(result, "hard").confusion.missed == 1
    assert row(result, "family:drupe").positives == 1
    assert result.counts["test"] == {
        "clean": 4, "fine_tuned": 0, "backdoored": 6, "reachable": 4, "weak": 1, "hard": 1,
    }  # fmt: skip
    assert result.costs["s"] == {"seconds": 2.0, "forward_images": 100.0, "backward_images": 90.0, "memory_mib": None}


def test_no_false_alarm_in_thirty_is_its_bound_in_the_text():
    entries = [*clean(), *clean("test", [0.2] * 30), entry(sizes={"s": 0.01}, backdoored=True)]
    text = render_zoo(made(entries))
    assert "0 of 30 (≤ 9.5%)" in text
    assert "1 of 1 (≥ 5.0%)" in text


def test_chain_takes_the_worst_of_its_scanners_and_says_who_helps():
    pool = [entry("calibration", {"a": size, "b": size}) for size in SIZES]
    bad = [entry(half, {"a": a, "b": b}, backdoored=True) for half in ("calibration", "test")
           for a, b in ((0.02, 0.2), (0.2, 0.02))]  # fmt: skip
    good = [entry("test", {"a": size, "b": size}) for size in SIZES]
    result = made([*pool, *bad, *good], ("a", "b"))
    assert [row(result, scanner=name).confusion.found for name in ("a", "b", "chain")] == [1, 1, 2]
    assert [row(result, scanner=name).absolute for name in ("a", "b", "chain")] == [(1, 0), (1, 0), (2, 0)]
    assert result.without["chain"] == 1.0
    assert result.without["without a"] == result.without["without b"] < 1


def test_a_budget_is_compared_with_the_next_larger_one_on_what_both_scanned():
    bad = [entry(sizes={"d/standard": a, "d/paper": 0.01}, backdoored=True) for a in (0.02, 0.3)]
    good = [entry(half, {"d/standard": 0.2, "d/paper": 0.2}) for half in ("calibration", "test")]
    others = [entry(sizes={"d/standard": 0.9}, backdoored=True), entry(sizes={"d/standard": 0.001})]
    hard = entry(sizes={"d/standard": 0.9, "d/paper": 0.9}, backdoored=True, hard=True)
    result = made([*bad, *good, *others, hard], ("d/smoke", "d/standard", "e/paper", "d/paper"))
    (one,) = result.prices
    assert (one.scanner, one.dear, one.positives, one.negatives) == ("d/standard", "d/paper", 2, 2)
    assert (one.auroc, one.dear_auroc) == (0.5, 1.0)
    assert "| d/standard | d/paper | 2 + 2 " in render_zoo(result)


def test_smallest_patch_is_read_off_the_test_half():
    bad = [
        entry(sizes={"s": size}, backdoored=True, area=area) for area, size in ((0.02, 0.3), (0.05, 0.01), (1.0, 0.3))
    ]
    other = entry("calibration", {"s": 0.01}, backdoored=True, area=0.01)
    assert made([*clean(), *bad, other]).smallest["s"] == (0.05, 1, 1)  # the blend is no patch


def test_calibration_files_are_what_scans_read(tmp_path):
    calibration = Calibration("decree/smoke", [
        dataclasses.replace(one, scans={"decree/smoke": one.scans["s"]}, recipe="0123456789ab")
        for one in [*clean(), *clean("test", [0.9] * 8)]
    ])  # fmt: skip
    (path,) = write_calibrations([calibration], tmp_path)
    assert path.name == "decree-smoke-z-01234567.json"
    read = read_reference(path)
    assert (read.scanner, read.recipe) == ("decree/smoke", "0123456789ab")
    assert read.scores == pytest.approx(SIZES)
    assert json.loads(path.read_text())["architecture"] == "fast"


def record(one: Entry, **extra) -> Record:
    scan = one.scans["s"]
    said = {"verdict": scan.verdict, "score": scan.score, "details": {"forward_images": scan.forward}}
    note = {
        "zoo": one.zoo, "family": one.family, "half": one.half, "hard": one.hard, "backdoored": one.backdoored,
        "attack": one.attack, "trigger": {"area": one.area} if one.area else None, "recipe": {"id": "r", "text": "t"},
        "architecture": "fast", "data": "shapes", "scans": {"s": {"verdict": said, "seconds": 2.0, "overlap": None}},
    }  # fmt: skip
    metrics = {"attack_success_rate": Metric.of([(9, 10)])} if one.backdoored else {}
    return Record("zoo", one.name, "0", 0, "cpu", 1, metrics=metrics, extra={"zoo": {**note, **extra}})


def folder(tmp_path, entries, names=None):
    for one in entries:
        record(one).write(tmp_path / "cells" / f"{one.name}.json")
    told = {"zoo": "z", "members": names or [one.name for one in entries], "scanners": ["s"], "chain": ["s"]}
    (tmp_path / "members.json").write_text(json.dumps(told))
    return tmp_path


def test_folder_is_read_and_tables_are_written(tmp_path, capsys):
    entries = [*clean(), *clean("test"), entry(sizes={"s": 0.02}, backdoored=True)]
    stale = entry(sizes={"s": 0.001})
    zoo = folder(tmp_path, [*entries, stale], [one.name for one in entries] + ["not-made-yet"])
    found = read_entries([zoo])
    assert len(found.entries) == len(entries)
    assert found.missing == 1
    assert found.entries[-1].success == 0.9
    assert zoo_table([zoo], None, "md") == 0
    out = capsys.readouterr().out
    assert "1 members have not been made yet" in out
    assert "1 calibration file(s)" in out
    assert json.loads((zoo / "zoo.json").read_text())["rows"][0]["confusion"]["found"] == 1
    assert (zoo / "zoo.md").read_text().startswith("# Zoo")
    assert len(list((zoo / "calibration").glob("*.json"))) == 1


def test_folders_that_hold_no_zoo(tmp_path):
    with pytest.raises(DataError, match="holds no zoo"):
        read_entries([tmp_path])
    with pytest.raises(DataError, match="no record of a zoo"):
        to_entry(Record("run", "x", "0", 0, "cpu", 1))
    broken = record(entry(sizes={"s": 0.1}), scans={"s": {}})
    with pytest.raises(DataError, match="damaged record of a zoo"):
        to_entry(broken)


def test_empty_and_one_sided_zoos_have_tables_without_numbers():
    assert "# Zoo" in render_zoo(made([]))
    lonely = made([*clean(), entry(sizes={"s": 0.02}, backdoored=True)])
    assert row(lonely).auroc is None
    assert not math.isnan(row(lonely).found_bound)
    render_zoo(lonely)
    uncalibrated = made([entry(sizes={"s": 0.02}, backdoored=True), entry(sizes={"s": 0.2})])
    assert uncalibrated.rows == ()
    assert uncalibrated.levels == {"s": {"none": 2}}


def test_help_of_the_command_needs_no_torch():
    code = "import sys, cupel.zoo.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
