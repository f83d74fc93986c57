"""`cupel inspect`: several files one after the other; a bad one does not hide the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from cupel.checkpoint.inspect import inspect_file
from cupel.checkpoint.text import clean
from cupel.errors import CupelError

__all__ = ["inspect_command"]


def inspect_command(files: Sequence[str], format: str = "text") -> int:
    """Print what is in each file.

    Args:
        files: Paths.
        format: `text`, or `json` for one object with a list `files`.

    Returns:
        1 if a file is unsafe or suspicious, else 2 if one could not be read, else 0.
    """
    codes, rows = set(), list[dict[str, Any]]()
    for file in files:
        try:
            found = inspect_file(file)
        except CupelError as error:
            codes.add(error.exit_code)
            reason = getattr(error, "code", "unreadable")
            rows.append({"path": clean(file, 4000), "verdict": None, "error": str(error), "code": reason})
            if format == "text":
                print(error, file=sys.stderr)
        else:
            codes.add(0 if found.verdict == "ok" else 1)
            rows.append(found.to_json())
            if format == "text":
                print(found.to_text())
    if format == "json":
        print(json.dumps({"schema": 1, "command": "inspect", "files": rows}, indent=1))
    return next((code for code in (1, 2) if code in codes), 0)
