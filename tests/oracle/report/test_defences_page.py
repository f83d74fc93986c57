"""Each scanner's verdict and what defences took, on the page."""

from __future__ import annotations

from typing import Any

import pytest

from cupel.records import Record
from cupel.report import render_report
from cupel.report.defences import costs_of, scanners_of
from reported import fake_arrays, fake_record

SAID = {"verdict": "backdoored", "score": 3.25, "threshold": 2.0, "tested": "small stamps",
        "details": {"forward_images": 43200, "backward_images": 21600.0}, "peak_memory_mib": 812.4}  # fmt: skip


def record_with(**extra: Any) -> Record:
    return fake_record(extra={**fake_record().extra, **extra})


def test_several_scanners_have_a_row_each_in_the_encoders_order() -> None:
    clean = {"decree": {**SAID, "verdict": "clean-by-test"}, "pscan": {"verdict": "inconclusive", "score": 0.0}}
    found = scanners_of(record_with(scans={"backdoored": {"decree": SAID, "pscan": SAID}, "clean": clean}))
    assert [(one["encoder"], one["scanner"], one["word"]) for one in found] == [
        ("Clean encoder", "decree", "clean-by-test"), ("Clean encoder", "pscan", "inconclusive"),
        ("Attacked encoder", "decree", "backdoored"), ("Attacked encoder", "pscan", "backdoored"),
    ]  # fmt: skip
    assert found[2]["forward"] == "43\u202f200"
    assert found[2]["backward"] == "21\u202f600"
    assert found[2]["memory"] == "812 MiB"
    assert (found[1]["forward"], found[1]["threshold"], found[1]["memory"]) == ("–", "–", "–")


def test_one_scanner_alone_needs_no_table() -> None:
    assert scanners_of(record_with(scans={"clean": {"decree": SAID}})) == []


def test_costs_of_purifiers_and_filters() -> None:
    given = {"purify ft": {"images": 500, "forward_images": 3200, "backward_images": 3200, "peak_memory_mib": None}}
    assert costs_of(record_with(defences=given)) == [
        {"kind": "purify", "method": "ft", "images": "500", "forward": "3\u202f200", "backward": "3\u202f200",
         "memory": "–"}
    ]  # fmt: skip


@pytest.mark.parametrize("odd", [3, "x", [1], {"clean": 3}, {"clean": {"a": 1, "b": 2}}, {"clean": {"a": {}, "b": {}}}])
def test_odd_records_do_not_break_the_page(odd: Any) -> None:
    html = render_report([(record_with(scans=odd, defences=odd), fake_arrays())], title="t")
    assert "<html" in html


def test_names_are_escaped() -> None:
    name = "<script>alert(1)</script>"
    html = render_report([(record_with(scans={"clean": {name: SAID, "b": SAID}}), fake_arrays())], title="t")
    assert "<script>alert" not in html
    assert "Each scanner" in html
