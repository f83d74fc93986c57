"""Nothing of a method is missing, nothing heavy is imported early, and the repository speaks of itself alone."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import cupel
import cupel.api
from cupel.errors import DataError
from cupel.experiment import cells, packaged, plan, read_experiment
from cupel.protocols import DataAttack, EncoderAttack, Objective, Probe, Purifier, Scanner, Trigger
from tables import METHODS, TABLES

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(cupel.__file__).parent
FROM_PAPERS = ("attacks", "objectives", "scanners", "filters", "purifiers", "certifiers")
VERBS = {
    "attacks": ("poison", "implant"), "objectives": ("learner",), "probes": ("fit",), "scanners": ("scan",),
    "filters": ("keep",),
    "purifiers": ("purify",), "certifiers": ("fit",), "triggers": ("__call__",), "encoders": ("build",),
}  # fmt: skip


@cache
def oracle_tests() -> dict[Path, str]:
    return {path: path.read_text("utf-8") for path in (ROOT / "tests" / "oracle").rglob("test_*.py")}


@pytest.mark.parametrize(("stage", "name", "cls"), METHODS)
def test_method_has_a_test_of_its_own(stage: str, name: str, cls: type) -> None:
    word = re.compile(rf"\b{cls.__name__}\b")
    assert any(word.search(text) for text in oracle_tests().values()), f"no file in tests/oracle tests {cls.__name__}"


@pytest.mark.parametrize(("stage", "name", "cls"), METHODS)
def test_method_is_documented(stage: str, name: str, cls: type) -> None:
    text = inspect.getdoc(cls) or ""
    first = text.splitlines()[0] if text else ""
    assert first.endswith("."), "the first line is a sentence"
    assert type(vars(cls).get("revision")) is int, "a `revision` of its own"
    if stage in FROM_PAPERS:
        assert re.search(r"^Source: \S", text, re.M), "the paper"
        assert re.search(r"^Deviations\b", text, re.M), "every difference from it, or `none`"


@pytest.mark.parametrize(("stage", "name", "cls"), METHODS)
def test_method_has_its_verb_and_is_exported(stage: str, name: str, cls: type) -> None:
    inherited = {name for one in cls.__mro__ for name in vars(one)}
    assert sum(verb in inherited for verb in VERBS[stage]) == 1
    package = sys.modules[cls.__module__.rpartition(".")[0]]
    assert cls.__name__ in package.__all__, f"{cls.__name__} is missing in __all__ of {package.__name__}"
    text = "\n".join(inspect.getdoc(one) or "" for one in cls.__mro__)
    for field in dataclasses.fields(cls):
        assert re.search(rf"\b{field.name}\b", text), f"setting '{field.name}' is not in the docstring"


@pytest.mark.parametrize("name", TABLES["attacks"])
def test_attack_has_a_packaged_experiment(name: str) -> None:
    used = [str(read_experiment(one)[0].get("attack")) for one in packaged()]
    assert any(f"'{name}'" in attack for attack in used), f"no file in src/cupel/papers runs {name}"


@pytest.mark.parametrize("name", packaged())
def test_packaged_experiment_parses_and_plans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("cupel.data.sources.fetch", offline)
    data, where = read_experiment(name)
    assert data["name"] == name, "named as its file"
    found = cells(data, where)
    assert found
    for _, experiment in found:
        try:
            steps = plan(experiment)
        except DataError as error:
            pytest.skip(f"data are not here: {error}")
        keys = [step.key for step in steps]
        done: set[str] = set()
        for step in steps:
            made = {one.key for one in step.inputs if one.stage != "data"}
            assert made <= done, f"'{step.name}' comes before its inputs"
            done.add(step.key)
        assert keys == [step.key for step in plan(experiment)]


@pytest.mark.parametrize("name", cupel.api.__all__)
def test_api_name_is_reached_from_the_top(name: str) -> None:
    """`cupel.name` is what `cupel.api.name` is, also after every subpackage was imported under its own name."""
    assert getattr(cupel, name) is getattr(cupel.api, name)


LIGHT = ["cupel", "cupel.cli", "cupel.report", "cupel.checkpoint", "cupel.checkpoint.inspect", "cupel.records"]


@pytest.mark.parametrize("module", LIGHT)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'torchvision', 'pandas', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


BARE = re.compile(
    r"#\s*(?:type:\s*ignore(?:\[[\w, -]+\])?"
    r"|no[q]a(?:: ?[A-Z]+\d+(?:, ?[A-Z]+\d+)*)?)\s*$",
    re.M,
)  # comments that silence a tool and give no reason
FORBIDDEN = {"torch.load", "pickle.load", "pickle.loads", "torch.seed", "np.random.seed", "random.seed"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_source_neither_unpickles_nor_leaves_stubs(path: Path) -> None:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN, f"line {node.lineno}"
            given = [k for k in node.keywords if k.arg == "trust_remote_code" and not _is_false(k.value)]
            assert not given, f"line {node.lineno}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "NotImplemented" not in ast.unparse(node.exc), f"line {node.lineno}"
    bare = BARE.search(text)
    assert bare is None, f"an exception without a reason: {bare and bare.group()}"
    public = any(isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__" for n in tree.body)
    assert public or path.name == "__main__.py", "public names stand in __all__"


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def tracked() -> list[Path]:
    try:
        found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [ROOT / name.decode() for name in found.split(b"\0") if name]


# put together from parts, so that this file does not find itself
PLACES = re.compile("/(?:" + "|".join(("work", "root", "home/[a-z]+", "Users/[A-Za-z]+", "opt")) + ")/")
LOCK_HOSTS = {"pypi.org", "files.pythonhosted.org"}


def test_no_tracked_file_names_a_machine() -> None:
    files = tracked()
    if not files:
        pytest.skip("this is no git checkout")
    found = []
    for path in files:
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):  # a picture, or removed since
            continue
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in PLACES.finditer(text)]
    assert found == []


def test_lock_names_the_public_registry_alone() -> None:
    lock = (ROOT / "uv.lock").read_text("utf-8")
    assert set(re.findall(r"https?://([^/\"]+)", lock)) <= LOCK_HOSTS
    sources = set(re.findall(r"^source = \{ (\w+) = \"([^\"]*)\"", lock, re.M))
    assert sources <= {("registry", "https://pypi.org/simple"), ("editable", ".")}


def test_protocols_are_met() -> None:
    """mypy checks the shapes; here only that every protocol has an inhabitant, so that none is a wish."""
    protocols = {DataAttack: "attacks", EncoderAttack: "attacks", Objective: "objectives", Probe: "probes"}
    protocols |= {Scanner: "scanners", Purifier: "purifiers", Trigger: "triggers"}
    for protocol, stage in protocols.items():
        verbs = [name for name in vars(protocol) if name in VERBS[stage]]
        assert verbs
        assert any(all(hasattr(cls, verb) for verb in verbs) for cls in TABLES[stage].values()), protocol.__name__


def test_tests_cannot_leave_the_machine() -> None:
    for call in (lambda: socket.create_connection(("192.0.2.1", 80)), lambda: socket.getaddrinfo("example.org", 80)):
        with pytest.raises(AssertionError, match="mark the test `network`"):
            call()
