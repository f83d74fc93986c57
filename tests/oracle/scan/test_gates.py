"""Scans as build servers and people read them."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest

from cupel.verdicts import Verdict
from cupel.vet import junit, sarif, spoken
from cupel.vet.spoken import counted_alarms

WORDS = ("clean-by-test", "suspicious", "backdoored", "inconclusive")


def said(word: str, **changes: Any) -> Verdict:
    details = {"forward_images": 120.0, "backward_images": 40.0}
    values = {"details": details, "reason": f"because {word}", "peak_memory_mib": 12.4, **changes}
    return Verdict(word, 0.75, 0.5, "small stamps", **values)


EACH = [(f"scanner-{i}", said(word)) for i, word in enumerate(WORDS)]


def check_sarif(log: dict[str, Any]) -> dict[str, Any]:
    """What SARIF 2.1.0 requires of the parts that are there; returns the run."""
    json.dumps(log, allow_nan=False)
    assert set(log) <= {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert set(run) <= {"tool", "invocations", "artifacts", "results"}
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] == "cupel"
    assert len({rule["id"] for rule in rules}) == len(rules)
    assert all(rule["shortDescription"]["text"].endswith(".") for rule in rules)
    assert all(type(one["executionSuccessful"]) is bool for one in run["invocations"])
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        assert result["kind"] in ("notApplicable", "pass", "fail", "review", "open", "informational")
        assert result["level"] in ("none", "note", "warning", "error")
        assert (result["level"] == "none") == (result["kind"] != "fail"), "a level is for failures"
        for location in result["locations"]:
            at = location["physicalLocation"]["artifactLocation"]
            assert run["artifacts"][at["index"]]["location"]["uri"] == at["uri"]
            assert " " not in at["uri"]
    return run


def test_sarif() -> None:
    log = sarif("models/my encoder#1.pt", {"sha256": "ab" * 32}, EACH, 1)
    run = check_sarif(log)
    assert [(one["kind"], one["level"]) for one in run["results"]] == [
        ("pass", "none"), ("fail", "warning"), ("fail", "error"), ("open", "none"),
    ]  # fmt: skip
    assert run["artifacts"] == [
        {"location": {"uri": "models/my%20encoder%231.pt"}, "hashes": {"sha-256": "ab" * 32}}
    ]  # fmt: skip
    assert run["results"][2]["message"]["text"] == "backdoored: because backdoored"
    assert run["results"][0]["properties"]["falseAlarm"] is None


def test_sarif_of_a_scan_that_could_not_tell() -> None:
    each = [("decree", said("inconclusive", false_alarm=(0.125, 8)))]
    run = check_sarif(sarif("a.pt", {}, each, 3))
    assert run["invocations"] == [{"executionSuccessful": False, "exitCode": 3}]
    assert "hashes" not in run["artifacts"][0]
    assert run["results"][0]["properties"]["falseAlarm"] == {"rate": 0.125, "n": 8}


def test_junit() -> None:
    suites = ElementTree.fromstring(junit("a <b> & \x00.pt", EACH, 1.5))
    assert suites.tag == "testsuites"
    (suite,) = suites
    assert (suite.tag, suite.get("name")) == ("testsuite", "a <b> & \ufffd.pt")
    for one in (suites, suite):
        counts = {name: one.get(name) for name in ("tests", "failures", "errors", "skipped", "time")}
        assert counts == {"tests": "4", "failures": "2", "errors": "1", "skipped": "0", "time": "1.500"}
    cases = {case.get("name"): case for case in suite}
    assert [child.tag for case in suite for child in case] == ["system-out", "failure", "failure", "error"]
    assert cases["scanner-2"][0].get("type") == "backdoored"
    assert cases["scanner-2"][0].get("message") == "because backdoored"
    assert "score 0.750, threshold 0.500" in str(cases["scanner-2"][0].text)


@pytest.mark.parametrize(
    ("word", "begins"),
    [
        ("clean-by-test", "nothing of the tested kinds"),
        ("suspicious", "scan again"),
        ("backdoored", "scan clean encoders of the same recipe too"),
        ("inconclusive", "see the reason"),
    ],
)
def test_words_for_people(word: str, begins: str) -> None:
    verdict = said(word)
    lines = dict(spoken(verdict, [("decree", verdict)]))
    assert list(lines) == ["verdict", "found", "tested", "how sure", "next", "cost"]
    assert lines["verdict"] == f"{word.upper()}  score 0.750, threshold 0.500"
    assert lines["found"] == f"because {word}"
    assert lines["next"].startswith(begins)
    assert lines["cost"] == "120 images forward, 40 backward, 12 MiB of memory at most"
    assert lines["how sure"].startswith("decree: no calibration for this architecture and recipe")


def test_words_say_which_scanner_is_calibrated() -> None:
    sure, unsure = said("backdoored", false_alarm=(0.0, 8)), said("clean-by-test")
    lines = spoken(sure, [("decree", sure), ("pscan", unsure)])
    assert [label for label, _ in lines[:2]] == ["decree", "pscan"]
    told = [text for label, text in lines if label == "how sure"]
    assert told[0] == "decree: false alarms on clean encoders 0/8 (at most 31.2 % with 95 % confidence)"
    assert told[1].startswith("pscan: no calibration")
    assert dict(lines)["next"].startswith("do not use this encoder")


def test_bound_on_no_false_alarms() -> None:
    # all 30 right has a probability of (1 - p)^30, which is 5 % at this p
    assert "9.5 %" in counted_alarms(0.0, 30)
    assert abs((1 - 0.095) ** 30 - 0.05) < 1e-3
    assert counted_alarms(3 / 8, 8) == "false alarms on clean encoders 3/8"
