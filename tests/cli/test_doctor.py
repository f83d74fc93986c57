"""`cupel doctor`: what it finds, on this machine and on made-up ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cupel import doctor as module
from cupel.doctor import doctor


def test_text_and_json_on_this_machine():
    run = [sys.executable, "-m", "cupel", "doctor"]
    text = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert text.returncode == 0, text.stderr
    for word in ("torch", "processor", "usable", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "TFLOP/s", "data"):
        assert word in text.stdout
    made = subprocess.run([*run, "--format", "json"], capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(made.stdout)
    assert (found["schema"], found["command"], found["problems"]) == (1, "doctor", [])
    assert found["tflops"]["float32"] > 0
    assert found["load"]["usable_cpus"] >= 1


def made_up(tmp_path, flags: str, monkeypatch) -> dict:
    (tmp_path / "cpuinfo").write_text(f"processor: 0\nmodel name: Alpha\nflags: fpu {flags}\nmodel name: Beta\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\nMemAvailable:   3145728 kB\n")
    (tmp_path / "stat").write_text("cpu  1 1 1 1 1 1 1\n")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return doctor({"OMP_NUM_THREADS": "64"}, tmp_path)


def test_a_made_up_machine(tmp_path, monkeypatch):
    found = made_up(tmp_path, "avx2 avx512_bf16 sse", monkeypatch)
    assert found["cpu"] == {"model": "Alpha", "features": ["avx2", "avx512_bf16"]}
    assert found["free"]["memory_gib"] == 3.0
    assert found["omp"]["OMP_NUM_THREADS"] == "64"


def test_slow_bf16_and_too_many_threads_are_warned_of(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("cupel.folding.bf16_pays", lambda device: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    said = " ".join(made_up(tmp_path, "avx2", monkeypatch)["warnings"])
    assert "precision=fp32" in said
    assert "asks for 64 threads" in said


@pytest.mark.parametrize("form", ["text", "json"])
def test_without_torch_it_says_so_and_fails(form, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert module.doctor_command(form) == 2
    out = capsys.readouterr().out
    assert "torch cannot be imported" in out
