"""Scanners: is there a backdoor in this encoder?"""

from collections.abc import Mapping

from cupel.scan.decree import Decree
from cupel.scan.reference import read_reference, shipped_reference
from cupel.settings import registry

__all__ = ["SCANNERS", "Decree", "read_reference", "shipped_reference"]

SCANNERS: Mapping[str, type] = registry("scanners", {"decree": Decree})
