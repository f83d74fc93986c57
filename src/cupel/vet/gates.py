"""A scan in the formats that build servers read: SARIF 2.1.0 and JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import cupel
from cupel.verdicts import Verdict

__all__ = ["junit", "sarif"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
# SARIF allows a level other than "none" on results of the kind "fail" alone
_RESULTS: Mapping[str, tuple[str, str]] = {
    "clean-by-test": ("pass", "none"),
    "suspicious": ("fail", "warning"),
    "backdoored": ("fail", "error"),
    "inconclusive": ("open", "none"),
}
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def sarif(encoder: str, source: Mapping[str, Any], each: Sequence[tuple[str, Verdict]], code: int) -> dict[str, Any]:
    """One run with a rule and a result per scanner.

    Args:
        encoder: As the user named it.
        source: What its card says of the file; `sha256` is passed on.
        each: Verdicts by scanner.
        code: Exit code of the command.

    Source: OASIS, Static Analysis Results Interchange Format 2.1.0.
    """
    where = {"uri": quote(encoder.replace("\\", "/"), safe="/:")}
    artifact: dict[str, Any] = {"location": where}
    if isinstance(source.get("sha256"), str):
        artifact["hashes"] = {"sha-256": source["sha256"]}
    rules = [{"id": name, "shortDescription": {"text": f"Looks for {verdict.tested}."}} for name, verdict in each]
    driver = {"name": "cupel", "version": cupel.__version__, "rules": rules}
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": code in (0, 1), "exitCode": code}],
        "artifacts": [artifact],
        "results": [_result(i, name, verdict, where) for i, (name, verdict) in enumerate(each)],
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(index: int, name: str, verdict: Verdict, where: Mapping[str, str]) -> dict[str, Any]:
    kind, level = _RESULTS[verdict.verdict]
    alarm = verdict.false_alarm
    return {
        "ruleId": name,
        "ruleIndex": index,
        "kind": kind,
        "level": level,
        "message": {"text": f"{verdict.verdict}: {verdict.reason}"},
        "locations": [{"physicalLocation": {"artifactLocation": {**where, "index": 0}}}],
        "properties": {
            "verdict": verdict.verdict,
            "score": verdict.score,
            "threshold": verdict.threshold,
            "falseAlarm": None if alarm is None else {"rate": alarm[0], "n": alarm[1]},
        },
    }


def junit(encoder: str, each: Sequence[tuple[str, Verdict]], seconds: float) -> str:
    """A test suite with a case per scanner: findings are failures; `inconclusive` is an error, for it must not pass.

    Args:
        encoder: As the user named it.
        each: Verdicts by scanner.
        seconds: Of the whole scan.
    """
    words = [verdict.verdict for _, verdict in each]
    counts = {
        "tests": str(len(each)),
        "failures": str(sum(word in ("suspicious", "backdoored") for word in words)),
        "errors": str(words.count("inconclusive")),
        "skipped": "0",
        "time": f"{seconds:.3f}",
    }
    suites = ElementTree.Element("testsuites", {"name": "cupel scan", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _printable(encoder), **counts})
    for name, verdict in each:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "cupel.scan", "name": name})
        if verdict.verdict != "clean-by-test":
            tag = "error" if verdict.verdict == "inconclusive" else "failure"
            said = {"type": verdict.verdict, "message": _printable(verdict.reason)}
            ElementTree.SubElement(case, tag, said).text = _printable(_numbers(verdict))
        else:
            ElementTree.SubElement(case, "system-out").text = _printable(f"{verdict.reason}; {_numbers(verdict)}")
    ElementTree.indent(suites, " ")
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=False)


def _numbers(verdict: Verdict) -> str:
    return f"score {verdict.score:.3f}, threshold {verdict.threshold:.3f}; tested: {verdict.tested}"


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold: file names may contain them."""
    return _NO_XML.sub("\ufffd", text)
