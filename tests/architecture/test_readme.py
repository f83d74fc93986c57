"""The README says what is there: methods, commands, a running example. UPDATE_README=1 rewrites its table."""

from __future__ import annotations

import inspect
import os
import re
import runpy
from pathlib import Path

import pytest
import typer

import cupel.cli
from tables import TABLES

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- methods:start -->", "<!-- methods:end -->"


def first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0].replace("|", "\\|")


def needs_of(cls: type) -> frozenset[str]:
    """What a method needs as its settings stand by default."""
    return frozenset(getattr(cls(), "needs", ()))


def methods_table() -> str:
    """One row a method, in the order of the tables; from what is in the code alone."""
    rows = ["| stage | name | class | what | needs |", "|---|---|---|---|---|"]
    for stage, table in TABLES.items():
        for name, cls in table.items():
            if cls.__module__.startswith("cupel."):
                needs = ", ".join(sorted(needs_of(cls))) or "–"
                rows.append(f"| {stage} | `{name}` | `{cls.__name__}` | {first_line(cls)} | {needs} |")
    return "\n".join(rows)


def test_methods_table_is_up_to_date() -> None:
    text = README.read_text("utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    expected = f"{before}{START}\n{methods_table()}\n{END}{after}"
    if os.environ.get("UPDATE_README") == "1":
        README.write_text(expected, "utf-8")
    else:
        assert text == expected, "write it with: UPDATE_README=1 pytest tests/architecture/test_readme.py"


def test_commands_are_those_of_the_command_line() -> None:
    there = set(typer.main.get_command(cupel.cli.app).commands)
    named = re.findall(r"^\| `cupel (\w+)", README.read_text("utf-8"), re.M)
    assert set(named) == there
    assert len(named) == len(there)


def test_files_it_links_to_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text("utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, but with few steps: names, signatures and order are right."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    short = code.replace('cupel.SimCLR.preset("fast")', "cupel.SimCLR(steps=2)")
    short = short.replace('cupel.default_chain("smoke")', "[cupel.Decree(steps=2), cupel.PScan(steps=2)]")
    short = re.sub(r"steps=\d+", "steps=2", short)
    assert short.count("steps=2") == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(short, "utf-8")
    runpy.run_path("example.py")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["clean", "backdoored", "purified"]
    assert (tmp_path / "purified.safetensors").exists()
