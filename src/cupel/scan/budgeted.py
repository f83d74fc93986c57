"""Methods with named budgets: settings by the budget's name, and the name by the settings."""

from __future__ import annotations

from typing import ClassVar

from cupel.settings import Budgets, canonical, digest

__all__ = ["Budgeted"]


class Budgeted(Budgets):
    """Base of settings that know `smoke`, `standard` and `paper`.

    Calibrations are found by `name`. Fields that a later release adds with a default change no name of a budget, so
    calibrations stay valid.

    Attributes:
        method: Name in the table of methods.
    """

    method: ClassVar[str]

    @property
    def name(self) -> str:
        """Method and budget, as references state it: `decree/smoke`; other settings get a digest."""
        for budget in self.budgets:
            if self == self.alike(budget):
                return f"{self.method}/{self._kind()}{budget}"
        return self._name_of_its_own()

    def _kind(self) -> str:
        """What stands before the budget in the name."""
        return ""

    def _name_of_its_own(self) -> str:
        return f"{self.method}/{self._kind()}" + digest(canonical(self, lambda path: path))[:8]
