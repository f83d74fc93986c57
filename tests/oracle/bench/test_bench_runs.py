"""The benchmarks of steps on a GPU, run on the CPU; and their refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import gpu


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    rows = {one["job"]: one for one in written["findings"]}
    assert set(rows) == {"SimCLR", "BadEncoder"}
    assert all(one["unit"] == "images/s" and one["value"] > 0 for one in rows.values())
    assert "copy's bandwidth" in rows["SimCLR"]["note"]
    assert (tmp_path / "gpu.md").read_text() in capsys.readouterr().out


def test_one_line_where_there_is_no_cuda(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_traffic_counts_reads_and_writes_but_no_views() -> None:
    x = torch.zeros(10, 10)
    with gpu.Traffic() as traffic:
        (x + x).view(-1).unsqueeze(0)
    assert traffic.bytes == 3 * 400
