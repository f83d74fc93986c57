"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing at all when used as a library."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

from cupel.errors import Interrupted

__all__ = [
    "Advance",
    "Lines",
    "Reporter",
    "Terminal",
    "reporting",
    "request_stop",
    "say",
    "stop_if_requested",
    "track",
]

Advance = Callable[..., None]
"""`advance(done, **numbers)`: `done` steps are finished in all; `numbers` are worth showing beside it."""


class Reporter(Protocol):
    """Where progress goes."""

    def say(self, text: str) -> None: ...
    def track(self, label: str, total: int) -> contextlib.AbstractContextManager[Advance]: ...


_current: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


_stop: list[int] = []


def request_stop(signal_number: int | None) -> None:
    """Ask every loop to stop at its next step; None takes the request back."""
    _stop[:] = [] if signal_number is None else [signal_number]


def stop_if_requested() -> None:
    """Raise at a point where nothing is half done.

    Raises:
        Interrupted: a stop was requested.
    """
    if _stop:
        raise Interrupted(_stop[0])


@contextlib.contextmanager
def reporting(reporter: Reporter | None) -> Iterator[None]:
    """Use `reporter` inside the `with`."""
    token = _current.set(reporter)
    try:
        yield
    finally:
        _current.reset(token)


def say(text: str) -> None:
    """One line for the user, if anyone listens."""
    if reporter := _current.get():
        reporter.say(text)


@contextlib.contextmanager
def track(label: str, total: int) -> Iterator[Advance]:
    """Follow a loop of `total` steps; between two steps it can be interrupted.

    Raises:
        Interrupted: from `advance`, when a stop was requested.
    """
    reporter = _current.get()
    if reporter is None:
        yield lambda done, **numbers: stop_if_requested()
        return
    with reporter.track(label, total) as show:

        def advance(done: int, **numbers: float) -> None:
            show(done, **numbers)
            stop_if_requested()

        yield advance


def _shown(numbers: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())


class Lines:
    """Plain lines on standard error, at most one per loop every `every` seconds."""

    def __init__(self, every: float = 5.0) -> None:
        self.every = every

    def say(self, text: str) -> None:
        """Print one line."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Print now and then, and once at the end."""
        start = last = time.monotonic()
        shown: dict[str, float] = {}

        def advance(done: int, **numbers: float) -> None:
            nonlocal last
            shown.update(numbers)
            now = time.monotonic()
            if now - last >= self.every and done < total:
                last = now
                self.say(f"  {label}  {done}/{total}  {_shown(shown)}".rstrip())

        yield advance
        self.say(f"  {label}  {total}/{total}  {_shown(shown)}  {time.monotonic() - start:.1f} s")


class Terminal:
    """A bar per loop, on standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Show a bar while the loop runs, and one line when it ends."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("  ", TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
        start, shown = time.monotonic(), dict[str, float]()
        with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=self.console, transient=True) as bar:
            task = bar.add_task(label, total=total, numbers="")

            def advance(done: int, **numbers: float) -> None:
                shown.update(numbers)
                bar.update(task, completed=done, numbers=_shown(shown))

            yield advance
        self.say(f"  {label}  {total}/{total}  {_shown(shown)}  {time.monotonic() - start:.1f} s")
