"""Purifiers: remove a backdoor from a copy of an encoder."""

from collections.abc import Mapping

from cupel.purify.cbd import CBD
from cupel.settings import registry

__all__ = ["CBD", "PURIFIERS"]

PURIFIERS: Mapping[str, type] = registry("purifiers", {"cbd": CBD})
