"""Parts of a zoo file: families, samples, purifiers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cupel.errors import SettingsError
from cupel.protocols import Purifier, Scanner
from cupel.purify import PURIFIERS
from cupel.retuning import Retuning
from cupel.scan import SCANNERS
from cupel.settings import OneOf, PositiveInt, settings

__all__ = ["GIVEN", "HALVES", "TWIN", "Family", "Half", "Purification", "Sample"]

Half = Literal["calibration", "test"]
GIVEN, TWIN = "given", "twin"
"""Names under which records of purifiers hold the encoder as given and its clean twin."""
HALVES: tuple[Half, ...] = ("calibration", "test")


@settings
class Family:
    """Members that differ in a grid alone.

    Args:
        changes: Dotted paths and values, put into the base experiment.
        hard: Its backdoors are out of reach of what the scanners look for; they are reported apart.
        calibration, test: The grid of each half, as an experiment's `grid` is.
    """

    changes: dict[str, Any] = Field(default_factory=dict)
    hard: bool = False
    calibration: dict[str, Any] | None = None
    test: dict[str, Any] | None = None


@settings
class Sample:
    """Scanners that only some encoders of the test half are given to: dear budgets, to compare the others with.

    Args:
        scan: Not among the others.
        size: Clean encoders, and as many backdoored ones that are not hard, spread over the file.
    """

    scan: Annotated[tuple[Annotated[Scanner, OneOf(SCANNERS)], ...], Field(min_length=1)]
    size: Annotated[int, Field(ge=1)] = 6


@settings
class Purification:
    """Purifiers that backdoored encoders are given to, beside their clean twins.

    Args:
        methods: By the name they have in tables.
        evidence: Names of scanners whose inverted triggers they get.
        half: Of the encoders: settings are chosen on the calibration half, and judged once on the test half.
        hard: Whether families that are hard take part.
        labelled: Images with labels for purifiers that need them.
        head_seeds: Heads on each purified encoder.
        retuning: How an attempt to wake the backdoor is made.
    """

    methods: Annotated[dict[str, Annotated[Purifier, OneOf(PURIFIERS)]], Field(min_length=1)]
    evidence: tuple[str, ...] = ("decree/standard", "pscan/standard")
    half: Half = "test"
    hard: bool = False
    labelled: PositiveInt = 1000
    head_seeds: PositiveInt = 3
    retuning: Retuning = Retuning()

    def __post_init__(self) -> None:
        for name in sorted({GIVEN, TWIN} & set(self.methods)):
            raise SettingsError("purify.methods", f"'{name}' is the row of an encoder itself", "choose another name")
