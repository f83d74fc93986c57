"""Tables: the numbers are the record's, and no cell harms a spreadsheet, a Markdown page or a LaTeX run."""

from __future__ import annotations

import csv
import io

import pytest

from cupel.errors import UsageError
from cupel.records import Metric
from cupel.report import render_table
from reported import fake_record


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_numbers_are_exact() -> None:
    record = fake_record(metrics={"attack_success_rate": Metric.of([(8, 10)])})  # Wilson by hand: 0.4902, 0.9433
    assert "80.0 (49.0–94.3)" in render_table([record])
    assert "| 80.0 (49.0–94.3) |" in render_table([record], format="md")
    assert "& 80.0 (49.0--94.3) &" in render_table([record], format="latex")
    (row,) = _rows(render_table([record], format="csv"))
    metric = record.metrics["attack_success_rate"]
    assert float(row["attack_success_rate"]) == 0.8
    assert float(row["attack_success_rate_low"]) == metric.low  # every digit survives
    assert (row["attack_success_rate_n"], row["attack_success_rate_seeds"]) == ("10", "1")


def test_what_could_not_be_measured_is_never_zero() -> None:
    none = fake_record(metrics={"clean_accuracy": Metric.of([(1, 2)]), "attack_success_rate": Metric.of([(0, 0)])})
    for format in ("text", "md", "latex"):
        shown = render_table([none], format=format)
        assert "not measurable" in shown
        assert " 0.0" not in shown
    (row,) = _rows(render_table([none], format="csv"))
    assert (row["attack_success_rate"], row["attack_success_rate_n"]) == ("", "0")
    zero = fake_record(metrics={"attack_success_rate": Metric.of([(0, 10)])})
    assert "0.0 (0.0–27.8)" in render_table([zero])


def test_one_row_per_task() -> None:
    metrics = {"gtsrb/attack_success_rate": Metric.of([(9, 10)]), "mnist/attack_success_rate": Metric.of([(5, 10)])}
    record = fake_record(metrics=metrics, extra={"targets": {"mnist": 1, "gtsrb": 12}})
    rows = _rows(render_table([record], format="csv"))
    assert [(row["task"], row["attack_success_rate"]) for row in rows] == [("mnist", "0.5"), ("gtsrb", "0.9")]


def test_what_purification_costs_the_clean_twin_stands_beside_its_accuracy() -> None:
    names = ("clean_accuracy", "backdoored_accuracy", "clean_purified_accuracy", "clean_purified_2_accuracy")
    found = {name: Metric.of([(n, 100)]) for name, n in zip(names, (70, 68, 69, 72), strict=True)}
    found |= {"clean_purified_retuned_accuracy": Metric.of([(1, 2)])}
    lines = render_table([fake_record(metrics=found)], "md").splitlines()
    header, row = ([cell.strip() for cell in line.split("|")] for line in (lines[0], lines[2]))
    shown = dict(zip(header, row, strict=True))
    assert header.index("CA %") + 1 == header.index("purified CA %")
    assert shown["purified CA − CA"] == "−1.0 points"
    assert shown["clean\\_purified\\_2\\_accuracy − CA"] == "+2.0 points"
    assert not any("retuned" in name for name in header)
    alone = fake_record(metrics={"clean_purified_accuracy": Metric.of([(1, 2)])})
    assert "| – |" in render_table([alone], "md")


@pytest.mark.parametrize("name", ["=cmd()|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1+1", "\x1b[31m=1"])
def test_no_cell_is_a_formula(name: str) -> None:
    (row,) = _rows(render_table([fake_record(name)], format="csv"))
    assert row["name"].startswith("'") or row["name"].lstrip()[0] not in "=+-@"
    assert not row["name"].lstrip().startswith(("=", "+", "-", "@"))


def test_hostile_names_stay_in_their_cell() -> None:
    record = fake_record("a|b\n<script>_x_[l](u) 50%&$#{}~^\\ \u202egnp.exe\x1b[31m")
    md = render_table([record], format="md")
    assert len(md.splitlines()) == 3
    assert "<script" not in md
    assert "a\\|b" in md
    latex = render_table([record], format="latex").splitlines()[5]
    assert r"50\%\&\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in latex
    for format in ("text", "md", "csv", "latex"):
        shown = render_table([record], format=format)
        assert "\u202e" not in shown
        assert "\x1b" not in shown


def test_unknown_format_says_what_there_is() -> None:
    with pytest.raises(UsageError, match="did you mean 'latex'"):
        render_table([], format="latx")
