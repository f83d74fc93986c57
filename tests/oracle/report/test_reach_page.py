"""What the page shows of reach: the line over the radius, the table, and the marks on the map."""

import re
from typing import Any

import numpy as np
import pytest

from cupel.report import render_report, svg
from cupel.report.reach import reach_chart, reach_of
from reported import fake_arrays, fake_record


def told(**reaches: float) -> dict[str, Any]:
    numbers = {
        k.replace("_", "-"): {"reach": v, "centred": v - 0.3, "inside": v / 2, "moved": 0.5} for k, v in reaches.items()
    }
    return {"reach": numbers, "images": 64}


def measured() -> dict[str, Any]:
    return {
        "purified": told(clean=0.3, triggered=0.35, linf_8=0.4, linf_51=0.5),
        "backdoored": told(clean=0.3, triggered=0.98, linf_8=0.45, linf_51=0.7, patch=0.9, inverted=0.96),
        "clean": told(clean=0.3, triggered=0.4, linf_8=0.32, linf_51=0.35, patch=0.31),
    }


def test_a_row_per_kind_and_a_column_per_encoder() -> None:
    view = reach_of(fake_record(extra={"reach": measured()}))
    assert view is not None
    assert view["encoders"] == ["Clean encoder", "Attacked encoder", "Purified encoder"]
    rows = {row["name"]: [(one["reach"], one["inside"]) for one in row["cells"]] for row in view["rows"]}
    assert list(rows)[:4] == ["clean images", "images with the trigger", "L∞, 8/255", "L∞, 51/255"]
    assert [reach for reach, _ in rows["L∞, 51/255"]] == ["0.35", "0.7", "0.5"]
    assert rows["patches, free content"] == [("0.31", "15.5\u202f%"), ("0.9", "45.0\u202f%"), ("–", "–")]
    assert view["rows"][0]["cells"][1] == {"reach": "0.3", "centred": "0", "inside": "15.0\u202f%"}
    assert [reach for reach, _ in rows["triggers that the scan inverted"]] == ["–", "0.96", "–"]


def test_lines_rise_with_reach_and_start_at_clean_images() -> None:
    chart = str(reach_chart({"backdoored": [(0, 0.0), (8, 0.5), (16, 1.0)], "clean": [(0, 0.0), (16, 0.0)]}))
    first, second = (
        [tuple(map(float, dot.split(","))) for dot in line.split()]
        for line in re.findall(r'<polyline class="series [^"]*" points="([^"]*)"', chart)
    )
    assert first == [(52.0, 156.0), (187.0, 84.0), (322.0, 12.0)]
    assert second == [(52.0, 156.0), (322.0, 156.0)]
    assert "Attacked encoder: 0 at 0, 1 at 16" in chart


def test_a_reach_below_nought_stays_on_the_chart() -> None:
    chart = str(reach_chart({"clean": [(0, -0.3), (51, 0.2)]}))
    dots = re.search(r'points="([^"]*)"', chart)
    assert dots is not None
    assert all(12 <= float(dot.split(",")[1]) <= 156 for dot in dots[1].split())


@pytest.mark.parametrize(
    "broken",
    [None, 3, [], {}, {"clean": 3}, {"clean": {"reach": 1}}, {"clean": {"reach": {}}}],
)
def test_what_was_not_measured_is_not_shown(broken: Any) -> None:
    assert reach_of(fake_record(extra={"reach": broken})) is None


def test_damaged_numbers_are_dashes() -> None:
    odd = {"clean": {"reach": {"clean": {"reach": "x"}, "linf-8": 4, "linf-9999": {}, "<b>": {"reach": float("nan")}}}}
    view = reach_of(fake_record(extra={"reach": odd}))
    assert view is not None
    assert view["chart"] is None
    assert {value for row in view["rows"] for one in row["cells"] for value in one.values()} == {"–"}
    page = render_report([(fake_record(extra={"reach": odd}), {})]).partition("Do stand-ins")[2]
    assert "<b>" not in page.partition("</table>")[0]


def test_the_page_has_chart_table_and_marks() -> None:
    arrays = fake_arrays()
    group = arrays["map/backdoored/group"].copy()
    group[:3], group[3:5] = -3, -4
    page = render_report([(fake_record(extra={"reach": measured()}), {**arrays, "map/backdoored/group": group})])
    assert "Do stand-ins come to where triggered images lie?" in page
    assert "stand-ins: a small L∞ perturbation per image" in page
    assert "stand-ins: patches" in page
    assert page.count('<path class="stand-in"') == 2 + 2  # in the legend, and on the map
    bare = render_report([(fake_record(), arrays)])
    assert "stand-in" not in bare.partition("</style>")[2]


def test_a_mark_per_stand_in() -> None:
    points = np.array([[0.0, 0.0], [1.0, 1.0], [0.5, 0.2], [0.2, 0.5]])
    chart = str(svg.scatter(points, np.array([0, -3, -4, -4]), {0: "cat"}, 0, "map"))
    triangles, squares = re.findall(r'<path class="stand-in" d="([^"]*)"', chart)
    assert (triangles.count("M"), squares.count("M")) == (1, 2)
