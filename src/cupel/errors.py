"""Errors that a user can act on: one line that says where, what, and what to do; each class carries its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "CupelError",
    "DataError",
    "Interrupted",
    "LabelsWithheld",
    "MachineError",
    "MissingExtra",
    "SettingsError",
    "UnsafeFile",
    "UsageError",
    "did_you_mean",
]


class CupelError(Exception):
    """A mistake or mishap outside the code: printed on one line without a traceback.

    Args:
        where: File, key or object it happened at.
        what: What is wrong.
        todo: What to do about it; may be empty.

    Example:
        >>> print(CupelError("exp.yaml.attack", "unknown key 'lamda'", "did you mean 'lambda'?"))
        exp.yaml.attack: unknown key 'lamda'; did you mean 'lambda'?
    """

    exit_code = 2

    def __init__(self, where: object, what: str, todo: str = "") -> None:
        self.where, self.what, self.todo = str(where), what, todo
        line = f"{self.where}: {what}" + (f"; {todo}" if todo else "")
        super().__init__(" ".join(line.split()))


class UsageError(CupelError):
    """Option, command, method, key or value given by the user is wrong."""

    exit_code = 4


class SettingsError(UsageError):
    """A key or value in YAML, in flags or in a constructor is wrong."""


class MissingExtra(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, where: object, package: str, extra: str) -> None:
        super().__init__(where, f"needs the package '{package}'", f"pip install 'cupel[{extra}]'")


class LabelsWithheld(UsageError):
    """A label-free method touched labels."""


class DataError(CupelError):
    """Images or a data set cannot be read or used."""


class MachineError(CupelError):
    """Disk full, no permission, out of memory."""


class Interrupted(CupelError):
    """The user or the system asked to stop; what was done is kept.

    Args:
        signal_number: 2 (Ctrl-C) → exit code 130, 15 → 143.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted", "stopped between two steps; what was done is kept")
        self.exit_code = 128 + signal_number


class CheckpointError(CupelError):
    """A checkpoint cannot be read or does not fit.

    Args:
        code: Stable short name of the reason (`truncated`, `missing-keys`, …), for scripts.
    """

    def __init__(self, where: object, what: str, todo: str = "", *, code: str = "unreadable") -> None:
        super().__init__(where, what, todo)
        self.code = code


class UnsafeFile(CheckpointError):
    """The file asks for code to be run. Nothing was run."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str], *, limit: int = 40) -> str:
    """The nearest known word and the list of all, for the end of an error line.

    Example:
        >>> did_you_mean("badencodr", ["badencoder", "ssl_backdoor"])
        "did you mean 'badencoder'? (known: badencoder, ssl_backdoor)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    listed = ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
    return (f"did you mean '{near[0]}'? " if near else "") + f"(known: {listed or 'none'})"
