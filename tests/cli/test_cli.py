"""The commands as a user meets them: exit codes, one line per mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from cupel import __version__
from cupel.cli import main
from cupel.encoders.storage import save_encoder
from cupel.scan import Decree, PScan
from toys import blobs, small_encoder, trained_encoder

SCAN = ["scan", "{root}/encoder.safetensors", "--images", "{root}/pictures"]
PURIFY = ["purify", *SCAN[1:], "--out"]


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    data = blobs(64)
    pictures = root / "pictures"
    pictures.mkdir()
    for i, pixels in enumerate(data.inputs):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(pictures / f"{i}.png")
    save_encoder(trained_encoder(data, steps=20), root / "encoder.safetensors")
    return root


@pytest.fixture(autouse=True)
def _quick_scans(monkeypatch):
    """Budgets are for encoders that are worth a scan."""
    monkeypatch.setattr(Decree, "budgets", {**Decree.budgets, "smoke": {"steps": 30, "batch_size": 16}})
    monkeypatch.setattr(Decree, "variant_budgets", {**Decree.variant_budgets, "smoke": {"num_seeds": 1, "steps": 5}})
    monkeypatch.setattr(PScan, "budgets", {**PScan.budgets, "smoke": {"batch_size": 4, "steps": 3}})


def one_line(capsys) -> str:
    text = capsys.readouterr().err.strip()
    lines = [line for line in text.splitlines() if line.startswith("cupel: ")]
    assert "Traceback" not in text
    assert len(lines) == 1, text
    return lines[0]


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"cupel {__version__}"


def test_help_lists_only_commands_that_work(capsys):
    assert call("--help") == 0
    out = capsys.readouterr().out
    for command in ("demo", "inspect", "scan", "purify", "run", "zoo", "report", "doctor"):
        assert command in out
    for later in ("leaderboard", "reproduce"):
        assert later not in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["frobnicate"], 4, "frobnicate"),
        (["scan"], 4, "missing"),
        (["scan", "x", "--images", "y", "--budget", "huge"], 4, "huge"),
        ([*SCAN, "--scanner", "decre"], 4, "did you mean 'decree'"),
        ([*SCAN, "--scanner", "decree,psacn"], 4, "did you mean 'pscan'"),
        ([*SCAN, "--scanner", "neural_cleanse"], 4, "neural_cleanse: needs labels"),
        ([*SCAN, "--scanner", "decree", "--scanner", "mntd"], 4, "mntd: needs labels"),
        ([*SCAN, "--scanner", "forensics"], 4, "forensics: needs reference"),
        ([*SCAN, "--scanner", "mntd_encoder"], 4, "choose one of decree"),
        ([*SCAN, "--format", "xml"], 4, "xml"),
        (["scan", "{root}/nowhere.pt", "--images", "{root}/pictures"], 2, "no such file"),
        (["scan", "{root}/encoder.safetensors", "--images", "{root}/nowhere"], 2, "nowhere"),
        (["scan", "{root}/empty.pt", "--images", "{root}/pictures"], 2, "empty"),
        (["scan", "{root}/page.pt", "--images", "{root}/pictures"], 2, "web page"),
        (["scan", "{root}/cut.safetensors", "--images", "{root}/pictures"], 2, "cut.safetensors"),
        (["scan", "{root}/evil.pt", "--images", "{root}/pictures"], 1, "evil.pt"),
        (["scan", "{root}/encoder.safetensors", "--images", "{root}/void"], 2, "void"),
        (["scan", "{root}/encoder.safetensors", "--images", "{root}/broken"], 2, "0.png"),
        ([*SCAN, "--arch", "resnet99"], 4, "resnet99"),
        ([*SCAN, "--arch", "fast,widht=3"], 4, "did you mean 'width'"),
        ([*PURIFY, "{root}/x.pt"], 4, ".safetensors"),
        ([*PURIFY, "{root}/x.safetensors", "--purifier", "cdb"], 4, "did you mean 'cbd'"),
        ([*PURIFY, "{root}/x.safetensors", "--set", "stps=3"], 4, "did you mean 'steps'"),
        (["run", "{root}/no.yaml"], 2, "no such file"),
        (["run", "{root}/typo.yaml"], 4, "did you mean 'upstream'"),
        (["run", "{root}/method.yaml"], 4, "did you mean 'simclr'"),
        (["run", "demo-digits", "--set", "attack.stesp=1", "--dry-run"], 4, "did you mean 'steps'"),
        (["report", "{root}/nowhere"], 2, "no such folder"),
        (["report", "{root}/void"], 2, "void"),
        (["demo", "--seed", "-1"], 4, "seed"),
        (["demo", "--data", "cifar10"], 4, "cifar10"),
    ],
)  # fmt: skip
def test_mistakes(folder, capsys, tmp_path, monkeypatch, arguments, code, says):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    monkeypatch.chdir(tmp_path)
    (folder / "empty.pt").write_bytes(b"")
    (folder / "page.pt").write_bytes(b"<!DOCTYPE html><html>quota exceeded</html>")
    (folder / "cut.safetensors").write_bytes((folder / "encoder.safetensors").read_bytes()[:5000])
    torch.save({"conv1.weight": torch.zeros(2, 3, 4, 4), "x": Evil()}, folder / "evil.pt")
    (folder / "void").mkdir(exist_ok=True)
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (folder / "typo.yaml").write_text(
        "name: a\nupstraem: {data: digits}\ndownstream: {data: digits, target_class: 1}\n"
    )
    (folder / "method.yaml").write_text(
        "name: a\nupstream: {data: digits, objective: simclrr}\ndownstream: {data: digits, target_class: 1}\n"
    )
    assert call(*(a.format(root=folder) for a in arguments)) == code
    assert says.lower() in one_line(capsys).lower()
    assert not list(tmp_path.iterdir())  # nothing written, nothing run


def test_inspect_is_clean_or_says_why(folder, capsys):
    assert call("inspect", folder / "encoder.safetensors") == 0
    out = capsys.readouterr().out
    assert "conv1.weight" in out
    assert call("inspect", folder / "encoder.safetensors", "--format", "json") == 0
    json.loads(capsys.readouterr().out)


def test_scan_then_purify(folder, tmp_path, capsys):
    arguments = ["--images", folder / "pictures", "--budget", "smoke"]
    code = call("scan", folder / "encoder.safetensors", *arguments, "--out", tmp_path / "scan")
    result = json.loads((tmp_path / "scan" / "result.json").read_text())
    assert result["schema"] == 1
    assert result["command"] == "scan"
    verdict = result["verdicts"]["scanned"]
    assert code == {"clean-by-test": 0, "suspicious": 1, "backdoored": 1, "inconclusive": 3}[verdict["verdict"]]
    assert "stamps" in verdict["tested"]
    assert (tmp_path / "scan" / "report.html").stat().st_size > 5000
    out = capsys.readouterr().out
    assert verdict["verdict"].upper() in out
    assert all(f"\n{label}" in out for label in ("found", "tested", "how sure", "next", "cost", "report"))
    assert "no calibration for this architecture and recipe" in out
    each = result["extra"]["scans"]["scanned"]
    assert list(each) == ["decree", "pscan", "decree-linf", "decree-frequency"]
    for one in each.values():
        assert one["details"]["forward_images"] > one["details"]["backward_images"] > 0
        assert one["peak_memory_mib"] > 50
    stored = np.load(tmp_path / "scan" / "evidence.npz")
    assert stored["images/scanned"].shape[0] == 1
    drawn = [name for name in stored.files if name.endswith("/path")]
    assert len(drawn) == sum(len(one["evidence"]) for name, one in each.items() if name.startswith("decree"))
    page = (tmp_path / "scan" / "report.html").read_text()
    assert page.count('class="start"') == len(drawn)
    judged = ", ".join(name for name, one in each.items() if one["verdict"] != "inconclusive")
    assert f"There are no clean encoders to compare with for {judged};" in page
    assert "enlarged 8 times" in page
    assert verdict["details"]["forward_images"] == sum(one["details"]["forward_images"] for one in each.values())
    code = call(
        "purify", folder / "encoder.safetensors", *arguments, "--out", tmp_path / "clean.safetensors",
        "--evidence", tmp_path / "scan", "--set", "steps=4", "--set", "batch_size=16",
    )  # fmt: skip
    assert code in (0, 1, 3)
    assert (tmp_path / "clean.safetensors").exists()
    purified = json.loads((tmp_path / "result.json").read_text())
    assert purified["command"] == "purify"
    # what the first scan looked for is looked for again
    assert purified["verdicts"]["purified"]["tested"] == verdict["tested"]


def test_too_few_images_is_inconclusive_and_never_0(folder, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(5):
        (few / f"{i}.png").write_bytes((folder / "pictures" / f"{i}.png").read_bytes())
    assert call("scan", folder / "encoder.safetensors", "--images", few, "--out", tmp_path / "out") == 3


def test_scan_for_build_servers(folder, tmp_path, capsys):
    arguments = ["scan", folder / "encoder.safetensors", "--images", folder / "pictures", "--budget", "smoke"]
    arguments += ["--scanner", "indicators,decree-linf", "--out", tmp_path / "out"]
    code = call(*arguments, "--format", "sarif")
    log = json.loads(capsys.readouterr().out)
    (run,) = log["runs"]
    assert [one["id"] for one in run["tool"]["driver"]["rules"]] == ["indicators", "decree-linf"]
    assert run["invocations"] == [{"executionSuccessful": code in (0, 1), "exitCode": code}]
    assert call(*arguments, "--format", "junit") == code
    suites = ElementTree.fromstring(capsys.readouterr().out)
    assert [one.get("name") for one in suites.iter("testcase")] == ["indicators", "decree-linf"]
    assert (int(suites.get("failures")) > 0) == (code == 1)
    assert call(*arguments, "--format", "json") == code
    assert list(json.loads(capsys.readouterr().out)["extra"]["scans"]["scanned"]) == ["indicators", "decree-linf"]


def test_constant_images_are_inconclusive(folder, tmp_path):
    np.savez(tmp_path / "grey.npz", x=np.full((64, 16, 16, 3), 128, np.uint8), y=np.zeros(64, np.int64))
    arguments = ["--images", tmp_path / "grey.npz", "--budget", "smoke", "--out", tmp_path / "out"]
    assert call("scan", folder / "encoder.safetensors", *arguments) == 3


def test_output_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = ["--images", folder / "pictures", "--budget", "smoke", "--out", tmp_path / "file" / "inside"]
    assert call("scan", folder / "encoder.safetensors", *arguments) == 2
    one_line(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


def test_foreign_checkpoint_needs_no_card(folder, tmp_path):
    torch.save({"state_dict": small_encoder().module.backbone.state_dict()}, tmp_path / "theirs.pth")
    arguments = ["--images", folder / "pictures", "--budget", "smoke", "--arch", "fast,width=8,input_size=16"]
    assert call("scan", tmp_path / "theirs.pth", *arguments, "--out", tmp_path / "out") in (0, 1, 3)


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("run", "demo-digits", "--dry-run") == 0
    assert "implant badencoder" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_keeps_a_checkpoint_and_says_how_to_resume(tmp_path, number, code):
    command = [
        sys.executable,
        "-m",
        "cupel",
        "run",
        "demo-digits",
        "--set",
        "upstream.objective.steps=100000",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "pretrain simclr" in line:  # the first numbers of the loop are out
            break
    time.sleep(0.5)
    process.send_signal(number)
    with process.stderr:
        rest = process.stderr.read()
    assert process.wait(timeout=60) == code, rest
    assert "resume with: cupel run demo-digits" in rest
    assert "Traceback" not in rest
    assert list((tmp_path / "store" / "running").glob("pretrain-*.safetensors"))
    assert not list(tmp_path.rglob("*.part"))
