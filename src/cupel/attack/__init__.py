"""Attacks on the training data and on trained encoders."""

from collections.abc import Mapping

from cupel.attack.badencoder import BadEncoder
from cupel.attack.ssl_backdoor import SSLBackdoor
from cupel.settings import registry

__all__ = ["ATTACKS", "BadEncoder", "SSLBackdoor"]

ATTACKS: Mapping[str, type] = registry("attacks", {"badencoder": BadEncoder, "ssl_backdoor": SSLBackdoor})
